package network

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func attrs(index int, name, mac string) netlink.LinkAttrs {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		panic(err)
	}
	return netlink.LinkAttrs{Index: index, Name: name, HardwareAddr: hw, MTU: 1500, EncapType: "ether", Flags: net.FlagUp}
}

func veth(index int, name, mac string, change ...func(*netlink.LinkAttrs)) netlink.Link {
	a := attrs(index, name, mac)
	for _, f := range change {
		f(&a)
	}
	return &netlink.Veth{LinkAttrs: a}
}

func network(s string) *net.IPNet {
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	if v4 := ip.To4(); v4 != nil {
		ip = v4
	}
	n.IP = ip
	return n
}

func address(index int, s string, flags int) netlink.Addr {
	return netlink.Addr{LinkIndex: index, IPNet: network(s), Flags: flags}
}

func route(index int, dst, via string, change ...func(*netlink.Route)) netlink.Route {
	r := netlink.Route{LinkIndex: index, Gw: net.ParseIP(via), Type: unix.RTN_UNICAST, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT}
	if dst != "" {
		r.Dst = network(dst)
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

func made(by netlink.RouteProtocol) func(*netlink.Route) {
	return func(r *netlink.Route) { r.Protocol = by }
}

const (
	mac0 = "0a:00:00:00:00:01"
	mac1 = "0a:00:00:00:00:02"
)

func TestUsableInterfaces(t *testing.T) {
	down := func(a *netlink.LinkAttrs) { a.Flags = 0 }
	port := func(a *netlink.LinkAttrs) { a.MasterIndex = 10 }
	s := scan{
		links: []netlink.Link{
			&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1, Name: "lo", Flags: net.FlagUp | net.FlagLoopback}},
			veth(5, "late", mac0),
			veth(2, "eth0", mac0),
			veth(3, "down", mac0, down),
			veth(4, "down-with-address", mac0, down),
			veth(6, "port", mac0, port),
			veth(7, "ours", mac0),
			&netlink.Tuntap{LinkAttrs: attrs(8, "tap-that-is-a-port", mac1)},
			veth(9, "taken-and-down", mac0, down),
			&netlink.Bridge{LinkAttrs: attrs(10, "bridge", mac0)},
			&netlink.Bridge{LinkAttrs: attrs(11, "bridge-of-a-tap", mac0)},
		},
		addrs: []netlink.Addr{address(4, "10.0.0.1/24", 0), address(1, "127.0.0.1/8", 0)},
	}
	s.links[7].Attrs().MasterIndex = 11
	var names []string
	for _, l := range s.usable(map[int]bool{7: true}, map[int]bool{9: true}) {
		names = append(names, l.Attrs().Name)
	}
	if diff := cmp.Diff([]string{"eth0", "down-with-address", "late", "tap-that-is-a-port", "taken-and-down", "bridge"}, names); diff != "" {
		t.Error(diff)
	}
}

func TestInterfacesThatCannotBeAGuests(t *testing.T) {
	var many []netlink.Link
	for i := range 33 {
		many = append(many, veth(i+2, fmt.Sprintf("eth%d", i), fmt.Sprintf("0a:00:00:00:01:%02x", i)))
	}
	mtu := func(mtu int) func(*netlink.LinkAttrs) { return func(a *netlink.LinkAttrs) { a.MTU = mtu } }
	for name, c := range map[string]struct {
		links []netlink.Link
		is    func(error) bool
		want  string
	}{
		"32 interfaces": {many[:32], errdefs.IsInvalidArgument, "at most 31"},
		"31 interfaces": {many[:31], nil, ""},
		"same MAC":      {[]netlink.Link{veth(2, "eth0", mac0), veth(3, "eth1", mac0)}, errdefs.IsInvalidArgument, `"eth0" and "eth1" have the same MAC address ` + mac0},
		"MTU 67":        {[]netlink.Link{veth(2, "eth0", mac0, mtu(67))}, errdefs.IsInvalidArgument, `"eth0" has MTU 67`},
		"MTU 68":        {[]netlink.Link{veth(2, "eth0", mac0, mtu(68))}, nil, ""},
		"MTU 65535":     {[]netlink.Link{veth(2, "eth0", mac0, mtu(65535))}, nil, ""},
		"MTU 65536":     {[]netlink.Link{veth(2, "eth0", mac0, mtu(65536))}, errdefs.IsInvalidArgument, "68 to 65535"},
		"multicast MAC": {[]netlink.Link{veth(2, "eth0", "01:00:00:00:00:01")}, errdefs.IsInvalidArgument, "no unicast address"},
		"no MAC":        {[]netlink.Link{veth(2, "eth0", "00:00:00:00:00:00")}, errdefs.IsInvalidArgument, "no unicast address"},
		"tunnel": {
			[]netlink.Link{&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "wg0", EncapType: "none"}}},
			errdefs.IsNotImplemented, `"wg0" (wireguard) is no Ethernet interface`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := check(c.links)
			if c.is == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestGuestNetwork(t *testing.T) {
	const permanent = unix.IFA_F_PERMANENT
	eth0, eth1 := veth(2, "eth0", mac0), veth(3, "eth1", mac1, func(a *netlink.LinkAttrs) { a.MTU, a.RawFlags = 9000, unix.IFF_NOARP })
	both := []netlink.Link{eth0, eth1}
	hw := eth1.Attrs().HardwareAddr
	for name, c := range map[string]struct {
		links   []netlink.Link
		scan    scan
		want    *agentv1.Network
		dropped []string
	}{
		"nothing": {want: &agentv1.Network{}},
		"two interfaces": {
			links: both,
			scan: scan{addrs: []netlink.Addr{
				address(2, "10.0.0.2/24", 0), address(3, "10.1.0.2/16", 0), address(2, "10.0.0.3/24", 0),
				address(2, "fd00::2/64", permanent), address(2, "fe80::5/64", permanent), address(1, "127.0.0.1/8", permanent),
				address(2, "fe80::800:ff:fe00:1/64", permanent), // EUI-64 of the MAC address
				address(2, "2001:db8::1/64", 0),                 // of a router's advertisement
			}},
			want: &agentv1.Network{Interfaces: []*agentv1.Interface{
				{Mac: mac0, Name: "eth0", Mtu: 1500, Addresses: []string{"10.0.0.2/24", "10.0.0.3/24", "fd00::2/64", "fe80::5/64"}},
				{Mac: mac1, Name: "eth1", Mtu: 9000, NoArp: true, Addresses: []string{"10.1.0.2/16"}},
			}},
		},
		"a peer's address and the kernel's route to it": {
			links: both[:1],
			scan: scan{
				addrs: []netlink.Addr{
					{LinkIndex: 2, IPNet: network("10.0.0.2/32"), Peer: network("10.0.0.1/32")},
					{LinkIndex: 2, IPNet: network("10.0.0.2/32"), Peer: network("10.0.0.3/32")},
				},
				routes: []netlink.Route{route(2, "10.0.0.1/32", "", made(protoKernel)), route(2, "", "10.0.0.1")},
			},
			want: &agentv1.Network{
				Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1500, Addresses: []string{"10.0.0.2/32"}}},
				Routes: []*agentv1.Route{
					{Interface: "eth0", Destination: "10.0.0.1/32", Type: 1},
					{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.0.0.1", Type: 1},
				},
			},
		},
		"routes that the guest's kernel makes": {
			links: both[:1],
			scan: scan{
				addrs: []netlink.Addr{address(2, "10.0.0.2/24", 0), address(2, "fd00::2/64", permanent)},
				routes: []netlink.Route{
					route(2, "10.0.0.0/24", "", made(protoKernel)),
					route(2, "fd00::/64", "", made(protoKernel)),
					route(2, "fe80::/64", "", made(protoKernel)),
					route(1, "::1/128", "", made(protoKernel)),
					route(2, "", "fe80::1", made(protoRA)),
					route(2, "10.0.0.2/32", "", func(r *netlink.Route) { r.Type, r.Table = unix.RTN_LOCAL, unix.RT_TABLE_LOCAL }),
					route(2, "ff00::/8", "", func(r *netlink.Route) { r.Type, r.Table = unix.RTN_MULTICAST, unix.RT_TABLE_LOCAL }),
				},
			},
			want: &agentv1.Network{
				Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1500, Addresses: []string{"10.0.0.2/24", "fd00::2/64"}}},
			},
		},
		"a gateway's own route comes first": {
			links: both[:1],
			scan: scan{routes: []netlink.Route{
				route(2, "", "169.254.1.1"),
				route(2, "10.7.0.0/16", "10.8.0.1", func(r *netlink.Route) { r.Scope = unix.RT_SCOPE_LINK }),
				route(2, "10.96.0.0/12", "10.0.0.1", func(r *netlink.Route) {
					r.Priority, r.MTU, r.Src = 7, 1400, net.ParseIP("10.0.0.2")
				}),
				route(2, "169.254.1.1/32", "", func(r *netlink.Route) { r.Scope = unix.RT_SCOPE_LINK }),
				route(2, "::/0", "fe80::1", func(r *netlink.Route) { r.Flags = unix.RTNH_F_ONLINK }),
				route(2, "10.5.0.0/16", "", func(r *netlink.Route) {
					r.Via = &netlink.Via{AddrFamily: netlink.FAMILY_V6, Addr: net.ParseIP("fe80::1")}
				}),
				route(0, "10.6.0.0/16", "", func(r *netlink.Route) { r.Type = unix.RTN_BLACKHOLE }),
				{LinkIndex: 2, Family: netlink.FAMILY_V6, Type: unix.RTN_UNICAST, Table: unix.RT_TABLE_MAIN},
			}},
			want: &agentv1.Network{
				Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1500}},
				Routes: []*agentv1.Route{
					{Interface: "eth0", Destination: "169.254.1.1/32", Scope: 253, Type: 1},
					{Destination: "10.6.0.0/16", Type: 6},
					{Interface: "eth0", Destination: "::/0", Type: 1},
					{Interface: "eth0", Destination: "10.7.0.0/16", Gateway: "10.8.0.1", Scope: 253, Type: 1},
					{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "169.254.1.1", Type: 1},
					{Interface: "eth0", Destination: "10.96.0.0/12", Gateway: "10.0.0.1", Source: "10.0.0.2", Priority: 7, Mtu: 1400, Type: 1},
					{Interface: "eth0", Destination: "::/0", Gateway: "fe80::1", OnLink: true, Type: 1},
					{Interface: "eth0", Destination: "10.5.0.0/16", Gateway: "fe80::1", Type: 1},
				},
			},
		},
		"what is not carried": {
			links: both[:1],
			scan: scan{routes: []netlink.Route{
				route(2, "10.1.0.0/16", "", func(r *netlink.Route) { r.Table = 100 }),
				route(2, "10.2.0.0/16", "", func(r *netlink.Route) { r.Table = 100 }),
				route(3, "10.3.0.0/16", ""),
			}},
			want:    &agentv1.Network{Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1500}}},
			dropped: []string{"the route to 10.3.0.0/16 by an interface that is not the VM's", "the routes of table 100"},
		},
		"permanent neighbours": {
			links: both[:1],
			scan: scan{neighs: []netlink.Neigh{
				{LinkIndex: 2, IP: net.ParseIP("10.0.0.1"), HardwareAddr: hw, State: netlink.NUD_PERMANENT},
				{LinkIndex: 2, IP: net.ParseIP("fd00::1"), HardwareAddr: hw, State: netlink.NUD_PERMANENT},
				{LinkIndex: 2, IP: net.ParseIP("10.0.0.9"), HardwareAddr: hw, State: netlink.NUD_REACHABLE},
				{LinkIndex: 3, IP: net.ParseIP("10.0.0.1"), HardwareAddr: hw, State: netlink.NUD_PERMANENT},
				{LinkIndex: 2, IP: net.ParseIP("10.0.0.8"), State: netlink.NUD_PERMANENT},
			}},
			want: &agentv1.Network{
				Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1500}},
				Neighbours: []*agentv1.Neighbour{
					{Interface: "eth0", Address: "10.0.0.1", Mac: mac1},
					{Interface: "eth0", Address: "fd00::1", Mac: mac1},
				},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, dropped, err := c.scan.guest(c.links)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(c.dropped, dropped); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestNetworksThatNoGuestCanHave(t *testing.T) {
	eth0 := []netlink.Link{veth(2, "eth0", mac0)}
	var addresses, routes, neighbours scan
	for i := range 65 {
		addresses.addrs = append(addresses.addrs, address(2, fmt.Sprintf("10.0.0.%d/24", i), 0))
	}
	for i := range 4097 {
		ip := net.IPv4(10, 0, byte(i>>8), byte(i)).To4()
		routes.routes = append(routes.routes, route(2, ip.String()+"/32", ""))
		neighbours.neighs = append(neighbours.neighs, netlink.Neigh{LinkIndex: 2, IP: ip, HardwareAddr: eth0[0].Attrs().HardwareAddr, State: netlink.NUD_PERMANENT})
	}
	for name, c := range map[string]struct {
		scan scan
		is   func(error) bool
		want string
	}{
		"addresses":  {addresses, errdefs.IsInvalidArgument, `interface "eth0" has 65 addresses`},
		"routes":     {routes, errdefs.IsInvalidArgument, "4097 routes"},
		"neighbours": {neighbours, errdefs.IsInvalidArgument, "4097 permanent neighbours"},
		"several next hops": {
			scan{routes: []netlink.Route{route(0, "10.0.0.0/8", "", func(r *netlink.Route) {
				r.MultiPath = []*netlink.NexthopInfo{{LinkIndex: 2}, {LinkIndex: 3}}
			})}},
			errdefs.IsNotImplemented, "the route to 10.0.0.0/8 has several next hops",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := c.scan.guest(eth0)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
