package network

import (
	"bytes"
	"cmp"
	"fmt"
	"net"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// Limits of the control protocol; of interfaces a VM has room for one less than that.
const (
	maxInterfaces = 31
	maxAddresses  = 64 // of one interface
	maxRoutes     = 4096
	maxNeighbours = 4096
	minMTU        = 68
	maxMTU        = 65535
)

// Origins of routes, as in linux/rtnetlink.h.
const (
	protoRedirect = 1
	protoKernel   = 2
	protoRA       = 9
)

// usable returns the interfaces that the guest is to have, by index: what is up or
// has an address, but loopback, the ports of other interfaces, and our own taps. An
// interface once taken stays until it is gone. A tap is the guest's though it is a
// port, for its far end is free: then the bridge is the namespace's own.
func (s scan) usable(taps, taken map[int]bool) []netlink.Link {
	addressed := map[int]bool{}
	for _, a := range s.addrs {
		addressed[a.LinkIndex] = true
	}
	bridges := map[int]bool{}
	for _, link := range s.links {
		if _, tap := link.(*netlink.Tuntap); tap {
			bridges[link.Attrs().MasterIndex] = true
		}
	}
	var links []netlink.Link
	for _, link := range s.links {
		a := link.Attrs()
		_, tap := link.(*netlink.Tuntap)
		switch {
		case a.Flags&net.FlagLoopback != 0, taps[a.Index], bridges[a.Index]:
		case a.MasterIndex != 0 && !tap:
		case a.Flags&net.FlagUp != 0, addressed[a.Index], taken[a.Index]:
			links = append(links, link)
		}
	}
	slices.SortFunc(links, byIndex)
	return links
}

func byIndex(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) }

// check tells why these interfaces cannot be a guest's.
func check(links []netlink.Link) error {
	if len(links) > maxInterfaces {
		return fmt.Errorf("it has %d interfaces besides loopback, and a VM at most %d: take some away, or set them down: %w",
			len(links), maxInterfaces, errdefs.ErrInvalidArgument)
	}
	owners := map[string]string{}
	for _, link := range links {
		a := link.Attrs()
		if a.EncapType != "ether" {
			return fmt.Errorf("interface %q (%s) is no Ethernet interface, which is all a VM can have: take it away, or set it down: %w",
				a.Name, link.Type(), errdefs.ErrNotImplemented)
		}
		if a.MTU < minMTU || a.MTU > maxMTU {
			return fmt.Errorf("interface %q has MTU %d, and a VM's has %d to %d: set it in the configuration of the CNI: %w",
				a.Name, a.MTU, minMTU, maxMTU, errdefs.ErrInvalidArgument)
		}
		mac := a.HardwareAddr
		if len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
			return fmt.Errorf("interface %q has the MAC address %q, which is no unicast address of six bytes: give it another: %w",
				a.Name, mac, errdefs.ErrInvalidArgument)
		}
		if other, ok := owners[mac.String()]; ok {
			return fmt.Errorf("interfaces %q and %q have the same MAC address %s, by which the guest knows its devices: give one of them another: %w",
				other, a.Name, mac, errdefs.ErrInvalidArgument)
		}
		owners[mac.String()] = a.Name
	}
	return nil
}

// guest says what the network of a guest with these interfaces is to be, and what
// of the namespace it will lack. NotImplemented for a route that it cannot have.
func (s scan) guest(links []netlink.Link) (*agentv1.Network, []string, error) {
	g := &agentv1.Network{}
	names := map[int]string{}
	for _, link := range links {
		a := link.Attrs()
		names[a.Index] = a.Name
		i := &agentv1.Interface{
			Mac:   a.HardwareAddr.String(),
			Name:  a.Name,
			Mtu:   uint32(a.MTU),
			NoArp: a.RawFlags&unix.IFF_NOARP != 0,
		}
		for _, addr := range s.addrs {
			if text := addr.IPNet.String(); addr.LinkIndex == a.Index && !ofKernel(addr, a.HardwareAddr) && !slices.Contains(i.Addresses, text) {
				i.Addresses = append(i.Addresses, text)
			}
		}
		if len(i.Addresses) > maxAddresses {
			return nil, nil, tooMany(fmt.Sprintf("interface %q", a.Name), len(i.Addresses), "addresses", maxAddresses)
		}
		g.Interfaces = append(g.Interfaces, i)
	}
	dropped, err := s.addRoutes(g, names)
	if err != nil {
		return nil, nil, err
	}
	for _, neigh := range s.neighs {
		name, ok := names[neigh.LinkIndex]
		if !ok || neigh.State&netlink.NUD_PERMANENT == 0 || len(neigh.HardwareAddr) != 6 || neigh.IP == nil || neigh.IP.IsMulticast() {
			continue
		}
		g.Neighbours = append(g.Neighbours, &agentv1.Neighbour{Interface: name, Address: neigh.IP.String(), Mac: neigh.HardwareAddr.String()})
	}
	if len(g.Routes) > maxRoutes {
		return nil, nil, tooMany("it", len(g.Routes), "routes", maxRoutes)
	}
	if len(g.Neighbours) > maxNeighbours {
		return nil, nil, tooMany("it", len(g.Neighbours), "permanent neighbours", maxNeighbours)
	}
	return g, dropped, nil
}

func tooMany(who string, count int, what string, most int) error {
	return fmt.Errorf("%s has %d %s, and a VM at most %d: take some away: %w", who, count, what, most, errdefs.ErrInvalidArgument)
}

// ofKernel tells of an address that the guest's kernel makes of itself: the
// link-local one that follows from the MAC address, and those of a router's
// advertisement, which the guest hears too.
func ofKernel(addr netlink.Addr, mac net.HardwareAddr) bool {
	if addr.IP.To4() != nil {
		return false
	}
	if addr.Flags&unix.IFA_F_PERMANENT == 0 {
		return true
	}
	// RFC 4291, appendix A.
	local := net.IP{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
	return addr.IP.Equal(local)
}

// addRoutes puts each route after those that its gateway is reached by.
func (s scan) addRoutes(g *agentv1.Network, names map[int]string) (dropped []string, err error) {
	for _, r := range s.routes {
		if s.implied(r) {
			continue
		}
		destination := destination(r)
		if len(r.MultiPath) > 0 || r.Encap != nil || r.NewDst != nil || r.MPLSDst != nil {
			return nil, fmt.Errorf("the route to %s has several next hops or an encapsulation, and a VM's has one gateway: replace it: %w",
				destination, errdefs.ErrNotImplemented)
		}
		name, ok := names[r.LinkIndex]
		if r.Type != unix.RTN_UNICAST {
			name, ok = "", true // it leads nowhere
		}
		if !ok {
			dropped = append(dropped, fmt.Sprintf("the route to %s by an interface that is not the VM's", destination))
			continue
		}
		if r.Table != unix.RT_TABLE_MAIN {
			dropped = append(dropped, "the routes of table "+strconv.Itoa(r.Table))
			continue
		}
		route := &agentv1.Route{
			Interface:   name,
			Destination: destination,
			Priority:    uint32(r.Priority),
			Scope:       uint32(r.Scope),
			Type:        uint32(r.Type),
			OnLink:      r.Flags&unix.RTNH_F_ONLINK != 0,
			Mtu:         uint32(r.MTU),
		}
		if r.Gw != nil {
			route.Gateway = r.Gw.String()
		} else if via, ok := r.Via.(*netlink.Via); ok { // an IPv6 gateway of an IPv4 route
			route.Gateway = via.Addr.String()
		}
		if r.Src != nil {
			route.Source = r.Src.String()
		}
		g.Routes = append(g.Routes, route)
	}
	// The kernel takes a gateway only if a route of a narrower scope leads there.
	slices.SortStableFunc(g.Routes, func(a, b *agentv1.Route) int {
		if near, far := a.Gateway == "", b.Gateway == ""; near != far {
			if near {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.Scope, a.Scope)
	})
	slices.Sort(dropped)
	return slices.Compact(dropped), nil
}

// implied tells of a route that the guest's kernel makes of itself, given the same
// addresses: to local and multicast addresses, to the prefix of an address, and
// what routers advertise.
func (s scan) implied(r netlink.Route) bool {
	switch r.Type {
	case unix.RTN_UNICAST, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
	default:
		return true
	}
	if r.Table == unix.RT_TABLE_LOCAL || r.Protocol == protoRA || r.Protocol == protoRedirect {
		return true
	}
	if r.Protocol != protoKernel || r.Dst == nil {
		return false
	}
	if r.Dst.IP.IsLoopback() || r.Dst.IP.IsLinkLocalUnicast() && r.Dst.IP.To4() == nil {
		return true
	}
	// Not so the route to the peer of an address: the guest has the address without.
	return slices.ContainsFunc(s.addrs, func(a netlink.Addr) bool {
		prefix := net.IPNet{IP: a.IP.Mask(a.Mask), Mask: a.Mask}
		return a.LinkIndex == r.LinkIndex && prefix.String() == r.Dst.String()
	})
}

func destination(r netlink.Route) string {
	switch {
	case r.Dst != nil:
		return r.Dst.String()
	case r.Family == netlink.FAMILY_V6:
		return "::/0"
	default:
		return "0.0.0.0/0"
	}
}
