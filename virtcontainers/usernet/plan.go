package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/containerd/errdefs"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// The guest's network is the same on every host, and none that a host's routes
// lead to: the guest reaches all of the host's own addresses, and does not care
// when they change. Its peers see the host's address as its packets' source.
//
// IPv4 is of the service continuity prefix (RFC 7335), which is for the ends of a
// tunnel within one host, and of global scope, other than 169.254.0.0/16, in which
// clouds have services. IPv6 is a unique local prefix (RFC 4193), "husk" in ASCII.
//
// passt takes connections to a Gateway for such to the host's loopback, and, on
// port 53, for such to the host's first name server: with one at 127.0.0.53 the
// guest finds it at Gateway4.
var (
	guest4 = netip.MustParsePrefix("192.0.0.2/29")
	guest6 = netip.MustParsePrefix("fd68:7573:6b00::2/64")
	// Gateway4 and Gateway6 are passt's own addresses. With an IPv6 one that is not
	// link-local, passt answers from another than it was asked at.
	Gateway4 = netip.MustParseAddr("192.0.0.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

const (
	// gatewayMAC is passt's.
	gatewayMAC = "0a:68:75:73:6b:01"
	// maxMTU is the most that passt tells a guest, and minMTU the least that IPv6
	// allows.
	minMTU, maxMTU = 1280, 65520
)

// A plan is all that passt's command line and the guest's configuration depend on.
type plan struct {
	mac  net.HardwareAddr
	mtu  int
	host host
}

// A host is what passt must know of the one it runs on.
type host struct {
	// device is an interface for passt to look at. It lends nothing of what is
	// given otherwise, and connections are not bound to it; but passt does no IPv6
	// unless it has a link-local address.
	device string
	// ipv6 is whether the host has an IPv6 address that others reach.
	ipv6 bool
}

func (opts Options) plan() (plan, error) {
	if len(opts.MAC) != 6 || opts.MAC[0]&1 != 0 || opts.MAC.String() == gatewayMAC {
		return plan{}, fmt.Errorf("MAC address %q is not a unicast one of six bytes, or is passt's: %w", opts.MAC, errdefs.ErrInvalidArgument)
	}
	if opts.MTU == 0 {
		opts.MTU = maxMTU
	}
	if opts.MTU < minMTU || opts.MTU > maxMTU {
		return plan{}, fmt.Errorf("MTU %d is not from %d to %d: %w", opts.MTU, minMTU, maxMTU, errdefs.ErrInvalidArgument)
	}
	links, err := readLinks()
	if err != nil {
		return plan{}, err
	}
	return plan{mac: opts.MAC, mtu: opts.MTU, host: look(links)}, nil
}

// A link is an interface of the host that is up.
type link struct {
	name  string
	addrs []netip.Addr
}

func readLinks() ([]link, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list the host's interfaces: %w", err)
	}
	var links []link
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil || i.Flags&net.FlagUp == 0 {
			continue // an interface that has just gone is as good as one that is down
		}
		l := link{name: i.Name}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				l.addrs = append(l.addrs, p.Addr())
			}
		}
		links = append(links, l)
	}
	return links, nil
}

// look finds in the host's interfaces what passt must know. A host of loopback
// alone, or without IPv6, has loopback for the device: IPv4 works with any.
func look(links []link) host {
	device, global := "", false
	for _, l := range links {
		for _, a := range l.addrs {
			if !a.Is6() {
				continue
			}
			global = global || a.IsGlobalUnicast()
			if device == "" && a.IsLinkLocalUnicast() {
				device = l.name
			}
		}
	}
	if device == "" || !global {
		return host{device: "lo"}
	}
	return host{device: device, ipv6: true}
}

// args is the command line after the program's name:
//
//   - All that passt would take from the host's interfaces is given, so that it
//     starts on a host without a default route and does what the guest is told.
//   - Nothing is configured in the guest by DHCP or router advertisements: the
//     agent does it.
//   - No port of the host is forwarded.
func (p plan) args() []string {
	args := []string{
		"--foreground", "--quiet", "--stderr",
		"--fd", strconv.Itoa(streamFD),
		"--interface", p.host.device,
		"--mac-addr", gatewayMAC,
		"--mtu", strconv.Itoa(p.mtu),
		"--address", guest4.Addr().String(), "--netmask", strconv.Itoa(guest4.Bits()),
		"--gateway", Gateway4.String(),
		"--dns-forward", Gateway4.String(),
		"--tcp-ports", "none", "--udp-ports", "none",
		"--no-dhcp", "--no-dhcpv6", "--no-ra",
	}
	if !p.host.ipv6 {
		return append(args, "--ipv4-only")
	}
	return append(args, "--address", guest6.Addr().String(), "--gateway", Gateway6.String(), "--dns-forward", Gateway6.String())
}

// guest is the same for the agent.
func (p plan) guest() *agentv1.Network {
	const name = "eth0"
	n := &agentv1.Network{
		Interfaces: []*agentv1.Interface{{
			Mac: p.mac.String(), Name: name, Mtu: uint32(p.mtu),
			Addresses: []string{guest4.String()},
		}},
		Routes: []*agentv1.Route{{Interface: name, Destination: "0.0.0.0/0", Gateway: Gateway4.String()}},
	}
	if p.host.ipv6 {
		n.Interfaces[0].Addresses = append(n.Interfaces[0].Addresses, guest6.String())
		n.Routes = append(n.Routes, &agentv1.Route{Interface: name, Destination: "::/0", Gateway: Gateway6.String()})
	}
	return n
}
