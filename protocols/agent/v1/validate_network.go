package agentv1

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Limits of a Network.
const (
	maxInterfaces = 32
	maxAddresses  = 64 // of one interface
	maxRoutes     = 4096
	maxNeighbours = 4096
	maxDevName    = 15 // IFNAMSIZ without the terminator
	minMTU        = 68 // RFC 791
	maxMTU        = 1<<16 - 1
	maxScope      = 255 // RT_SCOPE_NOWHERE

	// Types of route (RTN_*) that tell what becomes of a packet.
	typeUnspec      = 0
	typeUnicast     = 1
	typeLocal       = 2
	typeBlackhole   = 6
	typeUnreachable = 7
	typeProhibit    = 8
	typeThrow       = 9
)

// Validate implements the rules of the protocol.
func (m *UpdateNetworkRequest) Validate() error {
	if m.GetNetwork() == nil {
		return invalid("network is missing")
	}
	return m.GetNetwork().Validate()
}

// Validate implements the rules of the protocol.
func (*UpdateNetworkResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *Network) Validate() error {
	for _, list := range []struct {
		what    string
		n, most int
	}{
		{"interfaces", len(m.GetInterfaces()), maxInterfaces},
		{"routes", len(m.GetRoutes()), maxRoutes},
		{"neighbours", len(m.GetNeighbours()), maxNeighbours},
	} {
		if list.n > list.most {
			return invalid("%d %s, at most %d", list.n, list.what, list.most)
		}
	}
	names, macs := make(map[string]bool), make(map[string]bool)
	for i, dev := range m.GetInterfaces() {
		if err := dev.Validate(); err != nil {
			return fmt.Errorf("interfaces[%d]: %w", i, err)
		}
		if names[dev.GetName()] {
			return invalid("interfaces[%d]: name %q is taken", i, dev.GetName())
		}
		mac := strings.ToLower(dev.GetMac())
		if macs[mac] {
			return invalid("interfaces[%d]: MAC address %s is taken", i, mac)
		}
		names[dev.GetName()], macs[mac] = true, true
	}
	for i, r := range m.GetRoutes() {
		if err := r.Validate(); err != nil {
			return fmt.Errorf("routes[%d]: %w", i, err)
		}
		if !r.drops() && !names[r.GetInterface()] {
			return invalid("routes[%d]: interface %q is not one of the network's", i, r.GetInterface())
		}
	}
	for i, n := range m.GetNeighbours() {
		if err := n.Validate(); err != nil {
			return fmt.Errorf("neighbours[%d]: %w", i, err)
		}
		if !names[n.GetInterface()] {
			return invalid("neighbours[%d]: interface %q is not one of the network's", i, n.GetInterface())
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *Interface) Validate() error {
	if err := validDevName(m.GetName()); err != nil {
		return err
	}
	if err := validMAC(m.GetMac()); err != nil {
		return err
	}
	if mtu := m.GetMtu(); mtu < minMTU || mtu > maxMTU {
		return invalid("mtu %d is not in %d..%d", mtu, minMTU, maxMTU)
	}
	if n := len(m.GetAddresses()); n > maxAddresses {
		return invalid("%d addresses, at most %d", n, maxAddresses)
	}
	seen := make(map[netip.Prefix]bool, len(m.GetAddresses()))
	for i, s := range m.GetAddresses() {
		p, err := parsePrefix(s)
		if err != nil {
			return fmt.Errorf("addresses[%d]: %w", i, err)
		}
		if a := p.Addr(); a.IsUnspecified() || a.IsMulticast() {
			return invalid("addresses[%d]: %s is no interface's", i, a)
		}
		if seen[p] {
			return invalid("addresses[%d]: %s is there twice", i, p)
		}
		seen[p] = true
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *Route) Validate() error {
	switch m.GetType() {
	case typeUnspec, typeUnicast, typeLocal, typeBlackhole, typeUnreachable, typeProhibit, typeThrow:
	default:
		return invalid("type %d is not unicast, local, blackhole, unreachable, prohibit or throw", m.GetType())
	}
	switch {
	case !m.drops():
		if err := validDevName(m.GetInterface()); err != nil {
			return err
		}
	case m.GetInterface() != "" || m.GetGateway() != "" || m.GetSource() != "" || m.GetOnLink():
		return invalid("a route of type %d leads nowhere, and names an interface, gateway or source", m.GetType())
	}
	dst, err := parsePrefix(m.GetDestination())
	if err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if dst != dst.Masked() {
		return invalid("destination %s has bits beyond its length: use %s", dst, dst.Masked())
	}
	if m.GetGateway() != "" {
		gw, err := parseAddr(m.GetGateway())
		switch {
		case err != nil:
			return fmt.Errorf("gateway: %w", err)
		case gw.IsUnspecified() || gw.IsMulticast():
			return invalid("gateway %s is no host's", gw)
		case gw.Is4() && dst.Addr().Is6():
			return invalid("gateway %s of the IPv6 destination %s", gw, dst)
		}
	} else if m.GetOnLink() {
		return invalid("on_link without a gateway")
	}
	if m.GetSource() != "" {
		src, err := parseAddr(m.GetSource())
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		if src.Is4() != dst.Addr().Is4() {
			return invalid("source %s and destination %s are of two families", src, dst)
		}
	}
	if m.GetScope() > maxScope {
		return invalid("scope %d is not in 0..%d", m.GetScope(), maxScope)
	}
	if mtu := m.GetMtu(); mtu != 0 && (mtu < minMTU || mtu > maxMTU) {
		return invalid("mtu %d is not 0, nor in %d..%d", mtu, minMTU, maxMTU)
	}
	return nil
}

// drops tells whether packets go no further, whatever the interface.
func (m *Route) drops() bool {
	switch m.GetType() {
	case typeBlackhole, typeUnreachable, typeProhibit, typeThrow:
		return true
	}
	return false
}

// Validate implements the rules of the protocol.
func (m *Neighbour) Validate() error {
	if err := validDevName(m.GetInterface()); err != nil {
		return err
	}
	a, err := parseAddr(m.GetAddress())
	if err != nil {
		return err
	}
	if a.IsUnspecified() || a.IsMulticast() {
		return invalid("address %s is no host's", a)
	}
	return validMAC(m.GetMac())
}

// validDevName accepts what the kernel takes for the name of an interface, but
// lo, what is not printable, and the '%' that has it choose a number.
func validDevName(name string) error {
	if name == "" || len(name) > maxDevName {
		return invalid("interface name of %d bytes, want 1 to %d", len(name), maxDevName)
	}
	if name == "." || name == ".." || name == "lo" {
		return invalid("interface name is %q", name)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c > '~' || strings.IndexByte("/:%", c) >= 0 {
			return invalid("interface name %q holds %q", name, c)
		}
	}
	return nil
}

// validMAC accepts the address of one Ethernet station.
func validMAC(s string) error {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 || mac.String() != strings.ToLower(s) {
		return invalid("MAC address %q is not of the form aa:bb:cc:dd:ee:ff", s)
	}
	if mac[0]&1 != 0 || strings.Trim(s, "0:") == "" {
		return invalid("MAC address %s is no station's", s)
	}
	return nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Is4In6() || a.Zone() != "" {
		return a, invalid("%q is not an IPv4 or IPv6 address", s)
	}
	return a, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return p, invalid("%q is not of the form address/length", s)
	}
	return p, nil
}
