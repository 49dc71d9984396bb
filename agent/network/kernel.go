package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// kernel is the network namespace, by rtnetlink.
type kernel struct{ *netlink.Handle }

// rename gives each link, links[i] being that of devs[i], its name. Whatever has
// such a name already, and may be next in turn, is called by its index meanwhile.
// An interface that is renamed is set down, which older kernels demand.
func (k kernel) rename(devs []*agentv1.Interface, links []netlink.Link) error {
	names, err := k.names()
	if err != nil {
		return err
	}
	for i, dev := range devs {
		index, name := links[i].Attrs().Index, dev.GetName()
		if names[index] == name {
			continue
		}
		for holder, held := range names {
			if held != name {
				continue
			}
			parked := fmt.Sprint("husk", holder)
			if err := k.renameOne(holder, parked); err != nil {
				return fmt.Errorf("interface %q: take the name from another: %w", name, err)
			}
			names[holder] = parked
		}
		if err := k.renameOne(index, name); err != nil {
			return fmt.Errorf("interface %q: %w", name, err)
		}
		names[index] = name
	}
	return nil
}

// names returns the names of all interfaces by their indices.
func (k kernel) names() (map[int]string, error) {
	links, err := list(k.LinkList)
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

func (k kernel) renameOne(index int, name string) error {
	if err := k.LinkSetDown(byIndex(index)); err != nil {
		return fmt.Errorf("set down to rename: %w", err)
	}
	if err := k.LinkSetName(byIndex(index), name); err != nil {
		return fmt.Errorf("rename to %q: %w", name, err)
	}
	return nil
}

// byIndex is a link for calls that look at nothing but its index.
func byIndex(index int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// setDown sets an interface down; one that is gone is.
func (k kernel) setDown(index int) error {
	if err := k.LinkSetDown(byIndex(index)); err != nil && !gone(err) {
		return fmt.Errorf("set interface %d down: %w", index, err)
	}
	return nil
}

// configure sets all of an interface but its addresses, and sets it up: those of
// IPv6 do not outlast a link that is down.
func (k kernel) configure(dev *agentv1.Interface, link netlink.Link) error {
	link = byIndex(link.Attrs().Index)
	if err := k.LinkSetMTU(link, int(dev.GetMtu())); err != nil {
		return fmt.Errorf("set mtu %d: %w", dev.GetMtu(), err)
	}
	arp := k.LinkSetARPOn
	if dev.GetNoArp() {
		arp = k.LinkSetARPOff
	}
	if err := arp(link); err != nil {
		return fmt.Errorf("set arp %t: %w", !dev.GetNoArp(), err)
	}
	// The addresses are given, and whoever gave them knows that they are free. What
	// routers advertise the guest takes for itself, as the namespace does.
	file := "/proc/sys/net/ipv6/conf/" + dev.GetName() + "/accept_dad"
	if err := os.WriteFile(file, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) { // no IPv6
		return fmt.Errorf("set sysctl: %w", err)
	}
	if err := k.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

func (a address) netlink() *netlink.Addr {
	addr := &netlink.Addr{IPNet: ipNet(a.prefix), LinkIndex: a.dev.index}
	if a.prefix.Addr().Is6() {
		addr.Flags |= unix.IFA_F_NODAD
	}
	if a.noRoute {
		addr.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	return addr
}

func (k kernel) addAddress(a address) error {
	if err := k.AddrReplace(byIndex(a.dev.index), a.netlink()); err != nil {
		return fmt.Errorf("add %s: %w", a, err)
	}
	return nil
}

func (k kernel) removeAddress(a address) error {
	if err := k.AddrDel(byIndex(a.dev.index), a.netlink()); err != nil && !gone(err) {
		return fmt.Errorf("remove %s: %w", a, err)
	}
	return nil
}

func (r route) netlink() *netlink.Route {
	to := &netlink.Route{
		LinkIndex: r.dev.index,
		Dst:       ipNet(r.dst),
		Priority:  int(r.priority),
		Scope:     netlink.Scope(r.scope),
		Type:      int(r.kind),
		Table:     int(r.table),
		MTU:       int(r.mtu),
		Protocol:  unix.RTPROT_STATIC,
	}
	if r.source.IsValid() {
		to.Src = r.source.AsSlice()
	}
	if r.gateway.IsValid() && r.gateway.Is4() == r.dst.Addr().Is4() {
		to.Gw = r.gateway.AsSlice()
	} else if r.gateway.IsValid() {
		to.Via = &netlink.Via{AddrFamily: unix.AF_INET6, Addr: r.gateway.AsSlice()}
	}
	if r.onLink {
		to.Flags = unix.RTNH_F_ONLINK
	}
	return to
}

// addRoute adds a route beside those to the same destination: several
// interfaces may have one each.
func (k kernel) addRoute(r route) error {
	if err := k.RouteAppend(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add %s: %w", r, err)
	}
	return nil
}

func (k kernel) removeRoute(r route) error {
	if err := k.RouteDel(r.netlink()); err != nil && !gone(err) {
		return fmt.Errorf("remove %s: %w", r, err)
	}
	return nil
}

func (n neighbour) netlink() (*netlink.Neigh, error) {
	mac, err := net.ParseMAC(n.mac)
	return &netlink.Neigh{
		LinkIndex: n.dev.index, IP: n.addr.AsSlice(), HardwareAddr: mac, State: unix.NUD_PERMANENT,
	}, err
}

func (k kernel) setNeighbour(n neighbour) error {
	entry, err := n.netlink()
	if err == nil {
		err = k.NeighSet(entry)
	}
	if err != nil {
		return fmt.Errorf("set %s: %w", n, err)
	}
	return nil
}

func (k kernel) removeNeighbour(n neighbour) error {
	entry, err := n.netlink()
	if err == nil {
		err = k.NeighDel(entry)
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("remove %s: %w", n, err)
	}
	return nil
}

// gone tells whether the kernel says of what is to be removed that it, or its
// interface, is not there.
func gone(err error) bool {
	return slices.ContainsFunc([]error{unix.ESRCH, unix.ENOENT, unix.ENODEV, unix.EADDRNOTAVAIL, unix.ENXIO},
		func(no error) bool { return errors.Is(err, no) })
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
