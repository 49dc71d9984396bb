package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// huskPriority is that of Husk's filters, by which those of a shim that was killed
// are known.
const huskPriority = 0x4855

var ingressHandle = netlink.MakeHandle(0xffff, 0)

// redirect has every frame that comes in by one interface go out by the other.
func (n *Network) redirect(e *endpoint, from, to netlink.Link) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index, Handle: ingressHandle, Parent: netlink.HANDLE_INGRESS,
	}}
	err := n.handle.QdiscAdd(qdisc)
	if errors.Is(err, unix.EEXIST) {
		if err := n.dropRest(from); err != nil {
			return err
		}
		err = n.handle.QdiscAdd(qdisc)
	}
	if err != nil {
		return fmt.Errorf("add an ingress qdisc to %q: %w", from.Attrs().Name, err)
	}
	e.undo.Push("delete the ingress qdisc", undoTimeout, func(context.Context) error {
		err := n.handle.QdiscDel(qdisc)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // somebody else deleted it
			return nil
		}
		return ifThere(err)
	})
	// u32 with an empty key matches all, and is there where matchall is not.
	err = n.handle.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index, Parent: ingressHandle, Priority: huskPriority, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	})
	if err != nil {
		return fmt.Errorf("redirect %q to %q: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// dropRest deletes the ingress qdisc of an interface if it is what a killed shim
// left: one without filters, or with Husk's to a tap that has gone.
func (n *Network) dropRest(link netlink.Link) error {
	name := link.Attrs().Name
	foreign := func(what string) error {
		return fmt.Errorf("%q has a filter (%s) that is not Husk's, and would lose it: remove it (tc qdisc del dev %s ingress): %w",
			name, what, name, errdefs.ErrFailedPrecondition)
	}
	qdiscs, err := list(func() ([]netlink.Qdisc, error) { return n.handle.QdiscList(link) })
	if err != nil {
		return fmt.Errorf("list the qdiscs of %q: %w", name, err)
	}
	filters, err := list(func() ([]netlink.Filter, error) { return n.handle.FilterList(link, ingressHandle) })
	if err != nil {
		return fmt.Errorf("list the ingress filters of %q: %w", name, err)
	}
	for _, filter := range filters {
		u32, ok := filter.(*netlink.U32)
		if !ok || u32.Priority != huskPriority {
			return foreign(filter.Type())
		}
		for _, action := range u32.Actions {
			mirred, ok := action.(*netlink.MirredAction)
			if !ok || mirred.Ifindex == 0 {
				continue
			}
			if _, err := n.handle.LinkByIndex(mirred.Ifindex); err == nil {
				return fmt.Errorf("%q is joined with another VM already: give each pod a network namespace of its own: %w",
					name, errdefs.ErrFailedPrecondition)
			}
		}
	}
	for _, qdisc := range qdiscs {
		if qdisc.Attrs().Parent != netlink.HANDLE_INGRESS {
			continue
		}
		if qdisc.Type() != "ingress" {
			return foreign(qdisc.Type())
		}
		if err := n.handle.QdiscDel(qdisc); err != nil {
			return fmt.Errorf("delete the ingress qdisc of %q: %w", name, err)
		}
	}
	return nil
}
