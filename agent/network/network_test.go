package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	mac1 = "02:00:00:00:00:01"
	mac2 = "02:00:00:00:00:02"
)

// newNetns puts the test's goroutine into a network namespace of its own, which
// ends with the thread it is locked to.
func newNetns(t *testing.T) *Stack {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("no network namespace can be made: ", err)
	}
	return New()
}

// addLink makes a device with that address, one end of a veth whose other end is
// up and called name with a p.
func addLink(t *testing.T, name, mac string) {
	t.Helper()
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: hw}, PeerName: name + "p"}
	if err := netlink.LinkAdd(veth); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("no veth can be made: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName(name + "p")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(peer); err != nil {
		t.Fatal(err)
	}
}

func iface(name, mac string, addresses ...string) *agentv1.Interface {
	return &agentv1.Interface{Name: name, Mac: mac, Mtu: 1500, Addresses: addresses}
}

// two is a network of two interfaces with something of everything.
func two() *agentv1.Network {
	return &agentv1.Network{
		Interfaces: []*agentv1.Interface{
			{Name: "eth0", Mac: mac1, Mtu: 1400, Addresses: []string{"10.1.0.2/16", "10.1.0.3/16", "fd00:1::2/64"}},
			{Name: "net1", Mac: mac2, Mtu: 9000, Addresses: []string{"10.2.0.2/32", "fd00:2::2/64"}, NoArp: true},
		},
		Routes: []*agentv1.Route{
			{Interface: "eth0", Destination: "10.1.0.1/32", Scope: unix.RT_SCOPE_LINK, Source: "10.1.0.3"},
			{Interface: "eth0", Destination: "10.1.0.0/16", Gateway: "10.1.0.1", Source: "10.1.0.2"}, // as of CNI's ptp
			{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.1.0.1", Mtu: 1300},
			{Interface: "net1", Destination: "0.0.0.0/0", Gateway: "169.254.1.1", OnLink: true, Priority: 50},
			{Interface: "eth0", Destination: "192.0.2.0/24", Gateway: "fd00:1::1"},
			{Interface: "eth0", Destination: "::/0", Gateway: "fd00:1::1", Priority: 7},
			{Interface: "net1", Destination: "::/0", Gateway: "fe80::1", OnLink: true, Table: 1000},
			{Destination: "198.51.100.0/24", Type: unix.RTN_BLACKHOLE},
			{Destination: "fd00:9::/64", Type: unix.RTN_UNREACHABLE},
		},
		Neighbours: []*agentv1.Neighbour{
			{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:00:aa"},
			{Interface: "eth0", Address: "fd00:1::1", Mac: "02:00:00:00:00:bb"},
		},
	}
}

func set(t *testing.T, s *Stack, n *agentv1.Network) {
	t.Helper()
	if err := n.Validate(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.SetNetwork(ctx, n); err != nil {
		t.Fatal(err)
	}
}

// state describes the network as ip(8) would, sorted: all but loopback, what the
// kernel made of itself, and the other ends of the veths.
func state(t *testing.T) []string {
	t.Helper()
	var all []string
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[int]string)
	for _, l := range links {
		a := l.Attrs()
		if names[a.Index] = a.Name; a.Name == "lo" || strings.HasSuffix(a.Name, "p") {
			delete(names, a.Index)
			continue
		}
		up, arp := "down", "arp"
		if a.Flags&net.FlagUp != 0 {
			up = "up"
		}
		if a.RawFlags&unix.IFF_NOARP != 0 {
			arp = "noarp"
		}
		all = append(all, fmt.Sprintf("link %s %s mtu %d %s %s", a.Name, a.HardwareAddr, a.MTU, up, arp))
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, addr := range addrs {
			if addr.IP.IsLinkLocalUnicast() {
				continue
			}
			all = append(all, fmt.Sprintf("addr %s %s", a.Name, addr.IPNet))
			if addr.Flags&unix.IFA_F_TENTATIVE != 0 {
				t.Errorf("address %s is tentative", addr)
			}
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			neighs, err := netlink.NeighList(a.Index, family)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range neighs {
				if n.State == unix.NUD_PERMANENT {
					all = append(all, fmt.Sprintf("neigh %s %s %s", a.Name, n.IP, n.HardwareAddr))
				}
			}
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			if names[r.LinkIndex] == "" && r.Type == unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL || r.Dst.IP.IsLinkLocalUnicast() || r.Dst.IP.IsMulticast() {
				continue
			}
			s := fmt.Sprintf("route %s dev %s via %v src %v metric %d scope %d type %d table %d mtu %d",
				r.Dst, names[r.LinkIndex], r.Gw, r.Src, r.Priority, r.Scope, r.Type, r.Table, r.MTU)
			if r.Via != nil {
				s += fmt.Sprint(" via6 ", r.Via.(*netlink.Via).Addr)
			}
			all = append(all, s)
		}
	}
	slices.Sort(all)
	return all
}

// check compares the state with what is wanted, in any order.
func check(t *testing.T, want []string) {
	t.Helper()
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), state(t)); diff != "" {
		t.Errorf("network (-want +got):\n%s", diff)
	}
}

var wantTwo = []string{
	"link eth0 " + mac1 + " mtu 1400 up arp",
	"link net1 " + mac2 + " mtu 9000 up noarp",
	"addr eth0 10.1.0.2/16", "addr eth0 10.1.0.3/16", "addr eth0 fd00:1::2/64",
	"addr net1 10.2.0.2/32", "addr net1 fd00:2::2/64",
	"neigh eth0 10.1.0.1 02:00:00:00:00:aa", "neigh eth0 fd00:1::1 02:00:00:00:00:bb",
	"route 10.1.0.1/32 dev eth0 via <nil> src 10.1.0.3 metric 0 scope 253 type 1 table 254 mtu 0",
	"route 10.1.0.0/16 dev eth0 via 10.1.0.1 src 10.1.0.2 metric 0 scope 0 type 1 table 254 mtu 0",
	"route 0.0.0.0/0 dev eth0 via 10.1.0.1 src <nil> metric 0 scope 0 type 1 table 254 mtu 1300",
	"route 0.0.0.0/0 dev net1 via 169.254.1.1 src <nil> metric 50 scope 0 type 1 table 254 mtu 0",
	"route 192.0.2.0/24 dev eth0 via <nil> src <nil> metric 0 scope 0 type 1 table 254 mtu 0 via6 fd00:1::1",
	"route 198.51.100.0/24 dev  via <nil> src <nil> metric 0 scope 0 type 6 table 254 mtu 0",
	"route ::/0 dev eth0 via fd00:1::1 src <nil> metric 7 scope 0 type 1 table 254 mtu 0",
	"route ::/0 dev net1 via fe80::1 src <nil> metric 1024 scope 0 type 1 table 1000 mtu 0",
	"route fd00:1::/64 dev eth0 via <nil> src <nil> metric 256 scope 0 type 1 table 254 mtu 0",
	"route fd00:2::/64 dev net1 via <nil> src <nil> metric 256 scope 0 type 1 table 254 mtu 0",
	"route fd00:9::/64 dev  via <nil> src <nil> metric 1024 scope 0 type 7 table 254 mtu 0",
}

func TestSetNetworkIsIdempotent(t *testing.T) {
	s := newNetns(t)
	addLink(t, "a", mac1)
	addLink(t, "b", mac2)
	for range 2 {
		set(t, s, two())
		check(t, wantTwo)
	}
	set(t, New(), two()) // by one that does not know what is there
	check(t, wantTwo)
	for _, key := range []string{"ipv6/conf/eth0/accept_dad", "ipv4/ip_forward"} {
		if b, err := os.ReadFile("/proc/sys/net/" + key); err != nil || string(b) != "0\n" {
			t.Errorf("%s is %q, %v", key, b, err)
		}
	}
}

func TestSetNetworkKeepsLinkLocal(t *testing.T) {
	s := newNetns(t)
	addLink(t, "a", mac1)
	for range 2 {
		set(t, s, &agentv1.Network{Interfaces: []*agentv1.Interface{iface("eth0", mac1, "fd00::2/64")}})
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
	if err != nil || !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() }) {
		t.Errorf("addresses %v, %v", addrs, err)
	}
}

func TestSetNetworkTakesAwayWhatLeft(t *testing.T) {
	s := newNetns(t)
	addLink(t, "a", mac1)
	addLink(t, "b", mac2)
	set(t, s, two())
	// What others have put there is not the host's to take away.
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := netlink.ParseAddr("203.0.113.9/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(eth0, foreign); err != nil {
		t.Fatal(err)
	}
	set(t, s, &agentv1.Network{
		Interfaces: []*agentv1.Interface{iface("eth0", mac1, "10.1.0.3/16", "10.1.0.9/16")}, // the primary is gone
		Routes:     []*agentv1.Route{{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.1.0.254"}},
		Neighbours: []*agentv1.Neighbour{{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:00:cc"}},
	})
	want := []string{
		"link eth0 " + mac1 + " mtu 1500 up arp",
		"link net1 " + mac2 + " mtu 9000 down noarp",
		"addr eth0 10.1.0.3/16", "addr eth0 10.1.0.9/16", "addr eth0 203.0.113.9/32",
		"neigh eth0 10.1.0.1 02:00:00:00:00:cc",
		"route 10.1.0.0/16 dev eth0 via <nil> src 10.1.0.3 metric 0 scope 253 type 1 table 254 mtu 0",
		"route 0.0.0.0/0 dev eth0 via 10.1.0.254 src <nil> metric 0 scope 0 type 1 table 254 mtu 0",
	}
	check(t, want)
	net1, err := netlink.LinkByName("net1")
	if err != nil {
		t.Fatal(err)
	}
	set(t, s, two())
	check(t, append([]string{"addr eth0 203.0.113.9/32"}, wantTwo...))
	if err := netlink.LinkDel(net1); err != nil { // unplugged before the host says so
		t.Fatal(err)
	}
	set(t, s, &agentv1.Network{Interfaces: []*agentv1.Interface{iface("eth0", mac1)}})
	check(t, []string{"link eth0 " + mac1 + " mtu 1500 up arp", "addr eth0 203.0.113.9/32"})
	set(t, s, &agentv1.Network{})
	check(t, []string{"link eth0 " + mac1 + " mtu 1500 down arp", "addr eth0 203.0.113.9/32"})
}

func TestSetNetworkSwapsNames(t *testing.T) {
	s := newNetns(t)
	addLink(t, "eth1", mac1)
	addLink(t, "eth0", mac2)
	addLink(t, "eth2", "02:00:00:00:00:03") // nobody's, in the way
	for _, macs := range [][]string{{mac1, mac2}, {mac2, mac1}} {
		set(t, s, &agentv1.Network{
			Interfaces: []*agentv1.Interface{iface("eth0", macs[0], "10.0.0.1/24"), iface("eth1", macs[1], "10.0.1.1/24")},
		})
		for i, name := range []string{"eth0", "eth1"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			if got := link.Attrs().HardwareAddr.String(); got != macs[i] || link.Attrs().Flags&net.FlagUp == 0 {
				t.Errorf("%s has MAC address %s, want %s; flags %s", name, got, macs[i], link.Attrs().Flags)
			}
		}
	}
	set(t, s, &agentv1.Network{Interfaces: []*agentv1.Interface{iface("eth2", mac1)}})
	if link, err := netlink.LinkByName("eth2"); err != nil || link.Attrs().HardwareAddr.String() != mac1 {
		t.Errorf("eth2 is %v, %v", link, err)
	}
}

func TestSetNetworkErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*agentv1.Network)
		want string
	}{
		"gateway": {
			func(n *agentv1.Network) {
				n.Routes = append(n.Routes, &agentv1.Route{Interface: "eth0", Destination: "192.0.2.0/24", Gateway: "172.16.0.1"})
			},
			`set network: add route to 192.0.2.0/24 via 172.16.0.1 by interface "eth0": network is unreachable`,
		},
		"source": {
			func(n *agentv1.Network) {
				n.Routes = []*agentv1.Route{{Interface: "net1", Destination: "192.0.2.0/24", Source: "172.16.0.1", Scope: 253}}
			},
			`add route to 192.0.2.0/24 by interface "net1": invalid argument`,
		},
		"mtu": {
			func(n *agentv1.Network) { n.Interfaces[1].Mtu = 65535 + 1 },
			`interface "net1": set mtu 65536: `,
		},
		"address": {
			func(n *agentv1.Network) { n.Interfaces[1].Mtu = 1000 }, // too little for IPv6
			`add address fd00:2::2/64 of interface "net1": `,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newNetns(t)
			addLink(t, "a", mac1)
			addLink(t, "b", mac2)
			n := two()
			tc.edit(n)
			if err := s.SetNetwork(t.Context(), n); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			set(t, s, two()) // the next one mends it
			check(t, wantTwo)
		})
	}
}

func TestFindWaitsForADevice(t *testing.T) {
	newNetns(t)
	addLink(t, "a", mac1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	looks := 0
	links, err := find(ctx, func() ([]netlink.Link, error) {
		links, err := netlink.LinkList()
		if looks++; looks == 1 {
			addLink(t, "late", mac2) // after the list was read
			return links, netlink.ErrDumpInterrupted
		}
		if looks == 2 {
			links = links[:1] // loopback: as if the list were older
		}
		return links, err
	}, []*agentv1.Interface{iface("eth0", mac2), iface("eth1", mac1)})
	if err != nil || len(links) != 2 || links[0].Attrs().Name != "late" || links[1].Attrs().Name != "a" {
		t.Fatalf("found %v, %v", links, err)
	}
	if looks < 3 {
		t.Errorf("%d looks", looks)
	}
}

func TestSetNetworkNamesTheDeviceThatIsMissing(t *testing.T) {
	s := newNetns(t)
	addLink(t, "a", mac1)
	cause := errors.New("the host has lost patience")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
	err := s.SetNetwork(ctx, two())
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), `wait for devices "net1" (MAC address `+mac2+`)`) || strings.Contains(err.Error(), "eth0") {
		t.Fatalf("got %v", err)
	}
	check(t, []string{"link a " + mac1 + " mtu 1500 down arp"}) // nothing was touched
	<-s.turn
	if err := s.SetNetwork(ctx, two()); !errors.Is(err, cause) {
		t.Errorf("while another sets the network: %v", err)
	}
}

// TestMatchPrefersTheDeviceItself holds that what is stacked on a device does
// not pass for it.
func TestMatchPrefersTheDeviceItself(t *testing.T) {
	hw, _ := net.ParseMAC(mac1)
	other, _ := net.ParseMAC(mac2)
	device := func(index int, current, permanent net.HardwareAddr) netlink.Link {
		return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index, HardwareAddr: current, PermHWAddr: permanent}}
	}
	links := []netlink.Link{device(1, nil, nil), device(9, hw, nil), device(3, other, hw), device(2, hw, other)}
	found, missing := match(links, []*agentv1.Interface{iface("eth0", mac1), iface("eth1", mac2)})
	if len(missing) != 0 || found[0].Attrs().Index != 3 || found[1].Attrs().Index != 2 {
		t.Errorf("found %v, missing %v", found, missing)
	}
}
