package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Change is what the VM needs to follow its namespace. Removed and Added are not
// both in one.
type Change struct {
	// Removed are the ids of NICs to be detached. Their interfaces are gone.
	Removed []string
	// Added are NICs to be attached, with files that are open until the function
	// that is given the change returns.
	Added []hypervisor.NIC
	// Guest is the whole of what the guest's network is to be afterwards.
	Guest *agentv1.Network
}

// subscribe returns a socket that hears of every change of links, addresses,
// routes and neighbours in the calling thread's namespace.
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	var groups uint32
	for _, group := range []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	} {
		groups |= 1 << (group - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "rtnetlink"), nil
}

// Watch calls apply for each change since Open, one at a time, until ctx ends or
// the Network is closed, which are no errors. It is called once the VM has the
// NICs; what changes before that is not lost. A state of the namespace that no VM
// can have is logged, and what the VM has stays until there is one that it can.
// Close ends the context that apply is given and waits for it, so apply must not call
// Close.
func (n *Network) Watch(ctx context.Context, apply func(context.Context, Change)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	this := &watching{stop: cancel, done: make(chan struct{})}
	defer close(this.done)
	n.mu.Lock()
	closed, watched := n.closed, n.watching
	if !closed && watched == nil {
		n.watching = this
	}
	n.mu.Unlock()
	if closed {
		return nil
	}
	if watched != nil {
		return fmt.Errorf("watch the network namespace: it is watched already: %w", errdefs.ErrAlreadyExists)
	}
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.watching = nil
	}()
	if err := n.events.SetReadDeadline(time.Time{}); err != nil {
		return n.ended(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = n.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		if err := n.wait(); err != nil {
			return n.ended(err)
		}
		if err := n.follow(ctx, apply); err != nil {
			n.warn("the VM does not follow its network namespace: " + err.Error())
		}
	}
}

// ended returns err unless it is but the end that was asked for.
func (n *Network) ended(err error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("watch the network namespace: %w", err)
}

// wait returns when something has changed, having taken all that is queued: what
// it was, is read anew. So it does not matter if some of it was lost (ENOBUFS).
func (n *Network) wait() error {
	raw, err := n.events.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	var buffer [1]byte // the rest of each message is dropped
	err = raw.Read(func(fd uintptr) bool {
		for heard := false; ; {
			switch _, _, err := unix.Recvfrom(int(fd), buffer[:], unix.MSG_DONTWAIT); err {
			case nil, unix.ENOBUFS:
				heard = true
			case unix.EINTR:
			case unix.EAGAIN:
				return heard
			default:
				failed = os.NewSyscallError("recvfrom", err)
				return true
			}
		}
	})
	return errors.Join(err, failed)
}

// follow makes the VM's network what the namespace's is: first without what is
// gone, then with what is new.
func (n *Network) follow(ctx context.Context, apply func(context.Context, Change)) error {
	found, err := n.scan()
	if err != nil {
		return err
	}
	n.mu.Lock()
	endpoints := slices.Clone(n.endpoints)
	n.mu.Unlock()
	taps, taken := map[int]bool{}, map[int]bool{}
	for _, e := range endpoints {
		taps[e.tap], taken[e.index] = e.tap != 0, true
	}
	links := found.usable(taps, taken)
	if err := check(links); err != nil {
		return err
	}
	if _, _, err := found.guest(links); err != nil {
		return err
	}

	var kept, fresh []netlink.Link
	stay := map[*endpoint]bool{}
	for _, link := range links {
		i := slices.IndexFunc(endpoints, func(e *endpoint) bool { return e.fits(link) })
		if i < 0 {
			fresh = append(fresh, link)
			continue
		}
		kept = append(kept, link)
		stay[endpoints[i]] = true
	}
	if gone := slices.DeleteFunc(endpoints, func(e *endpoint) bool { return stay[e] }); len(gone) > 0 {
		err = n.remove(ctx, found, kept, gone, apply)
	}
	return errors.Join(err, n.extend(ctx, found, kept, fresh, apply))
}

// remove takes endpoints out of the VM and then out of the namespace.
func (n *Network) remove(ctx context.Context, found scan, kept []netlink.Link, gone []*endpoint, apply func(context.Context, Change)) error {
	guest, dropped, err := found.guest(kept)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.endpoints = slices.DeleteFunc(n.endpoints, func(e *endpoint) bool { return slices.Contains(gone, e) })
	n.mu.Unlock()
	n.settle(guest, dropped)
	change := Change{Guest: guest}
	for _, e := range gone {
		change.Removed = append(change.Removed, e.nic.ID)
	}
	apply(ctx, change)
	var errs []error
	for _, e := range gone {
		errs = append(errs, n.unplug(e))
	}
	return errors.Join(errs...)
}

// extend gives the VM what is new, be it only an address. An interface that cannot
// be had does not keep the others away.
func (n *Network) extend(ctx context.Context, found scan, kept, fresh []netlink.Link, apply func(context.Context, Change)) error {
	var change Change
	var added []*endpoint
	var errs []error
	for _, link := range fresh {
		e, err := n.plug(ctx, link)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		kept = append(kept, link)
		added = append(added, e)
		change.Added = append(change.Added, e.nic)
	}
	slices.SortFunc(kept, byIndex)
	before := n.Guest()
	var dropped []string
	var err error
	if change.Guest, dropped, err = found.guest(kept); err != nil {
		errs = append(errs, err) // it was none with more interfaces
	} else {
		n.settle(change.Guest, dropped)
		if len(added) > 0 || !proto.Equal(before, change.Guest) {
			apply(ctx, change)
		}
	}
	for _, e := range added {
		n.closeFiles(e)
		n.add(e)
	}
	return errors.Join(errs...)
}

// fits tells that the VM's device serves for the interface. A device cannot
// change its MAC address, nor carry more than the MTU that it was made with.
func (e *endpoint) fits(link netlink.Link) bool {
	a := link.Attrs()
	return e.index == a.Index && slices.Equal(e.nic.MAC, a.HardwareAddr) && a.MTU <= e.nic.MTU
}
