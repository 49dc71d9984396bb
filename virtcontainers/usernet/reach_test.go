package usernet

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func up(t *testing.T, name string, addrs ...string) int {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	for _, a := range addrs {
		parsed, err := netlink.ParseAddr(a)
		must(t, err)
		parsed.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrAdd(l, parsed))
	}
	must(t, netlink.LinkSetUp(l))
	return l.Attrs().Index
}

// onHost runs the calling test in a network namespace and a mount namespace of its
// own, the latter like the shim's. It reports whether this is already there.
func onHost(t *testing.T) bool {
	t.Helper()
	needPasst(t)
	if os.Getenv(againEnv) == "" {
		if output, err := again(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, output)
		}
		return false
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""))
	up(t, "lo")
	must(t, os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0o644))
	resolver := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(resolver, []byte("nameserver 127.0.0.53\n"), 0o644))
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	must(t, err)
	must(t, unix.Mount(resolver, target, "", unix.MS_BIND, "")) // ends with the namespace
	return true
}

// wire connects this namespace, as 10.9.0.1 and fd09::1, with another machine,
// 10.9.0.2 and fd09::2, which is its default gateway. do runs there.
func wire(t *testing.T, do func()) {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer0"}))
	peer, err := netlink.LinkByName("peer0")
	must(t, err)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	must(t, err)
	defer here.Close()
	there, err := netns.New()
	must(t, err)
	defer there.Close()
	must(t, netns.Set(here))
	must(t, netlink.LinkSetNsFd(peer, int(there)))
	must(t, netns.Set(there))
	up(t, "peer0", "10.9.0.2/24", "fd09::2/64")
	do()
	must(t, netns.Set(here))

	index := up(t, "eth0", "10.9.0.1/24", "10.9.7.1/32", "fd09::1/64", "fe80::9:1/64")
	for _, gateway := range []string{"10.9.0.2", "fd09::2"} {
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: netip.MustParseAddr(gateway).AsSlice()}))
	}
	must(t, netns.Set(there))
	settle(t)
	must(t, netns.Set(here))
	settle(t)
}

// settle waits until the kernel takes the addresses of this namespace for its own: it
// has a local route to each. Those of IPv6 it makes by a work queue, and to an address
// that is tentative not before it has seen the carrier.
func settle(t *testing.T) {
	t.Helper()
	news, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	must(t, err)
	defer news.Close()
	must(t, news.SetReceiveTimeout(&unix.Timeval{Sec: 60}))
	for {
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
		must(t, err)
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6,
			&netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		must(t, err)
		without := slices.DeleteFunc(addrs, func(a netlink.Addr) bool {
			return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.IP.Equal(a.IP) })
		})
		if len(without) == 0 {
			return
		}
		if _, _, err := news.Receive(); err != nil {
			t.Fatalf("wait for routes to %v: %v", without, err)
		}
	}
}

func TestGuestReachesWhatItsHostDoes(t *testing.T) {
	if !onHost(t) {
		return
	}
	var away []netip.AddrPort
	wire(t, func() {
		away = append(away, listen(t, "tcp", "10.9.0.2:0"), listen(t, "tcp", "[fd09::2]:0"))
	})
	n := serve(t, Options{})
	if addrs := n.Guest().Interfaces[0].Addresses; len(addrs) != 2 {
		t.Errorf("the guest has %q", addrs)
	}
	g := newGuest(t, n)
	if mac := g.neighbour(Gateway6); mac != gatewayMAC {
		t.Errorf("the gateway is at %s", mac)
	}
	for _, tt := range []struct {
		name, network, listen string
		via                   netip.Addr // in place of the listener's address
	}{
		{"loopback by the gateway", "tcp", "127.0.0.1:0", Gateway4},
		{"loopback by the gateway, IPv6", "tcp", "[::1]:0", Gateway6},
		{"loopback by the gateway, UDP", "udp", "127.0.0.1:0", Gateway4},
		{"loopback by the gateway, UDP, IPv6", "udp", "[::1]:0", Gateway6},
		{"the host's address", "tcp", "10.9.0.1:0", netip.Addr{}},
		{"the host's second address", "tcp", "10.9.7.1:0", netip.Addr{}},
		{"the host's address, IPv6", "tcp", "[fd09::1]:0", netip.Addr{}},
		{"the host's address, UDP", "udp", "10.9.0.1:0", netip.Addr{}},
		{"the host's resolver", "udp", "127.0.0.53:53", Gateway4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g.t = t
			exchange(t, g, tt.network, listen(t, tt.network, tt.listen), tt.via)
		})
	}
	for _, peer := range away {
		t.Run("another machine, "+peer.Addr().String(), func(t *testing.T) {
			g.t = t
			exchange(t, g, "tcp", peer, netip.Addr{})
		})
	}
	g.t = t
	if got := g.tcp(netip.MustParseAddrPort("10.9.0.1:9"), ""); got != "RST" {
		t.Errorf("a closed port answers %q", got)
	}
	for _, peer := range []string{"10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"} {
		if got := g.ping(netip.MustParseAddr(peer), "data"); got != "data" {
			t.Errorf("ping %s: got %q", peer, got)
		}
	}
}

func exchange(t *testing.T, g *guest, network string, peer netip.AddrPort, via netip.Addr) {
	t.Helper()
	if via.IsValid() {
		peer = netip.AddrPortFrom(via, peer.Port())
	}
	said := "hello"
	got := ""
	if network == "tcp" {
		got = g.tcp(peer, said)
	} else {
		said = strings.Repeat("long", 10_000) // one frame at this MTU
		got = g.udp(peer, said)
	}
	if want := fmt.Sprintf("%d %s", len(said), said); got != want {
		t.Errorf("got %d bytes, %.20q, want %d, %.20q", len(got), got, len(want), want)
	}
}

// A host without an interface but loopback, and without a route.
func TestHostOfLoopbackAlone(t *testing.T) {
	if !onHost(t) {
		return
	}
	n := serve(t, Options{MTU: 1500})
	if addrs := n.Guest().Interfaces[0].Addresses; len(addrs) != 1 {
		t.Errorf("the guest has %q", addrs)
	}
	g := newGuest(t, n)
	exchange(t, g, "tcp", listen(t, "tcp", "127.0.0.1:0"), Gateway4)
	if got := g.tcp(netip.MustParseAddrPort("10.9.0.2:9"), ""); got != "RST" {
		t.Errorf("an address without a route answers %q", got)
	}
}
