package network

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
)

// scanAttempts bounds how often a listing is repeated that changed meanwhile. The
// change that spoils the last one is an event, upon which all is read anew.
const scanAttempts = 16

// A scan is what a namespace holds at one moment, in the kernel's order.
type scan struct {
	links  []netlink.Link
	addrs  []netlink.Addr
	routes []netlink.Route // of all tables
	neighs []netlink.Neigh
}

// scan reads the namespace. A tap that the VM has directly is shown with the MAC
// address that it had before.
func (n *Network) scan() (scan, error) {
	var s scan
	var err error
	if s.links, err = list(n.handle.LinkList); err != nil {
		return s, fmt.Errorf("list interfaces: %w", err)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := list(func() ([]netlink.Addr, error) { return n.handle.AddrList(nil, family) })
		if err != nil {
			return s, fmt.Errorf("list addresses: %w", err)
		}
		if family == netlink.FAMILY_V6 {
			// The kernel lists the newest first. Added in this order, the guest's
			// would prefer another as the source of its connections.
			slices.Reverse(addrs)
		}
		routes, err := list(func() ([]netlink.Route, error) {
			return n.handle.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return s, fmt.Errorf("list routes: %w", err)
		}
		neighs, err := list(func() ([]netlink.Neigh, error) { return n.handle.NeighList(0, family) })
		if err != nil {
			return s, fmt.Errorf("list neighbours: %w", err)
		}
		s.addrs, s.routes, s.neighs = append(s.addrs, addrs...), append(s.routes, routes...), append(s.neighs, neighs...)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, e := range n.endpoints {
		for _, link := range s.links {
			if e.direct && link.Attrs().Index == e.index {
				link.Attrs().HardwareAddr = e.nic.MAC
			}
		}
	}
	return s, nil
}

// list repeats a listing that the kernel says is not of one moment.
func list[T any](f func() ([]T, error)) (all []T, err error) {
	for range scanAttempts {
		if all, err = f(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil
}
