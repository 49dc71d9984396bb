package network

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func TestPodWithTwoInterfaces(t *testing.T) {
	node, pod := nodeAndPod(t)
	joinPod(node, pod, "net1", "")
	mac := pod.link("net1").Attrs().HardwareAddr
	local := net.IP{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
	pod.ip(
		"addr add "+local.String()+"/64 dev net1 nodad", // as the guest's kernel makes it
		"addr add 10.10.0.2/16 dev net1", "addr add 10.10.0.3/16 dev net1", "addr add fd10::2/64 dev net1 nodad", "addr add fd10::3/64 dev net1 nodad",
		"route add 10.96.0.0/12 via 10.10.0.1 metric 5 mtu 1300 src 10.10.0.3",
		"route add 192.168.7.0/24 via 172.16.0.1 dev net1 onlink",
		"route add blackhole 10.200.0.0/16",
		"-6 route add default via fd09::1",
		"-6 route add fd20::/64 via fe80::1 dev net1",
		"neigh add 10.9.0.77 lladdr 0a:00:00:00:00:77 dev eth0 nud permanent",
		"neigh add fd09::77 lladdr 0a:00:00:00:00:77 dev eth0 nud permanent",
	)
	before := pod.state()
	n := mustOpen(t, pod, testOptions(t))
	eth0, net1 := pod.link("eth0").Attrs().HardwareAddr, pod.link("net1").Attrs().HardwareAddr
	want := &agentv1.Network{
		Interfaces: []*agentv1.Interface{
			{Mac: eth0.String(), Name: "eth0", Mtu: 1400, Addresses: []string{"10.9.0.2/24", "fd09::2/64"}},
			{Mac: net1.String(), Name: "net1", Mtu: 1500, Addresses: []string{"10.10.0.2/16", "10.10.0.3/16", "fd10::2/64", "fd10::3/64"}},
		},
		Routes: []*agentv1.Route{
			{Destination: "10.200.0.0/16", Type: unix.RTN_BLACKHOLE},
			{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.9.0.1", Type: 1},
			{Interface: "net1", Destination: "10.96.0.0/12", Gateway: "10.10.0.1", Source: "10.10.0.3", Priority: 5, Mtu: 1300, Type: 1},
			{Interface: "net1", Destination: "192.168.7.0/24", Gateway: "172.16.0.1", OnLink: true, Type: 1},
			{Interface: "net1", Destination: "fd20::/64", Gateway: "fe80::1", Priority: 1024, Type: 1},
			{Interface: "eth0", Destination: "::/0", Gateway: "fd09::1", Priority: 1024, Type: 1},
		},
		Neighbours: []*agentv1.Neighbour{
			{Interface: "eth0", Address: "10.9.0.77", Mac: "0a:00:00:00:00:77"},
			{Interface: "eth0", Address: "fd09::77", Mac: "0a:00:00:00:00:77"},
		},
	}
	if diff := cmp.Diff(want, n.Guest(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	nics := n.NICs()
	if len(nics) != 2 || nics[0].ID == nics[1].ID {
		t.Fatalf("NICs %+v", nics)
	}
	for i, want := range []struct {
		mac net.HardwareAddr
		mtu int
	}{{eth0, 1400}, {net1, 1500}} {
		if nic := nics[i]; !bytes.Equal(nic.MAC, want.mac) || nic.MTU != want.mtu || len(nic.Taps) != 1 || len(nic.Vhost) != 0 {
			t.Errorf("NIC %d is %+v, want %v with MTU %d", i, nic, want.mac, want.mtu)
		}
		if a := pod.link([]string{"husk0", "husk1"}[i]).Attrs(); a.MTU != want.mtu || a.Flags&net.FlagUp == 0 {
			t.Errorf("tap %s has MTU %d and is %v, want %d and up", a.Name, a.MTU, a.Flags, want.mtu)
		}
		if out := pod.run("ip -o addr show dev " + []string{"husk0", "husk1"}[i]); out != "" {
			t.Errorf("the tap has an address of its own: %s", out)
		}
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, pod.state()); diff != "" {
		t.Errorf("Close left something behind: %s", diff)
	}
	if err := n.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
}

// arp asks, by the tap of a NIC, for the MAC address of 10.9.0.1, as a guest with
// 10.9.0.2 does, and waits for the answer of the node's kernel.
func arp(t *testing.T, nic hypervisor.NIC) {
	t.Helper()
	const header = 10 // struct virtio_net_hdr
	frame := make([]byte, header, 128)
	frame = append(frame, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	frame = append(frame, nic.MAC...)
	frame = append(frame, 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1)
	frame = append(append(frame, nic.MAC...), 10, 9, 0, 2)
	frame = append(frame, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1)
	tap, buffer := nic.Taps[0], make([]byte, 70000)
	answer := append(bytes.Clone(nic.MAC), 10, 9, 0, 2)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		// As a guest, ask again: a link that has just come up may lose a frame.
		if _, err := tap.Write(frame); err != nil {
			t.Fatalf("write a frame: %v", err)
		}
		if err := tap.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		for {
			count, err := tap.Read(buffer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatalf("read a frame: %v", err)
			}
			got := buffer[header:max(count, header)]
			if len(got) >= 42 && bytes.Equal(got[:6], nic.MAC) && bytes.Equal(got[12:14], []byte{8, 6}) && got[21] == 2 && bytes.Equal(got[32:42], answer) {
				return
			}
		}
	}
	t.Fatal("no answer from the node")
}

func TestFramesFlowBothWays(t *testing.T) {
	t.Run("veth", func(t *testing.T) {
		_, pod := nodeAndPod(t)
		arp(t, mustOpen(t, pod, testOptions(t)).NICs()[0])
	})
	t.Run("several queues", func(t *testing.T) {
		_, pod := nodeAndPod(t)
		o := testOptions(t)
		o.Queues = 2
		nics := mustOpen(t, pod, o).NICs()
		if len(nics[0].Taps) != 2 {
			t.Fatalf("%d queues, want 2", len(nics[0].Taps))
		}
		// The kernel answers by the queue that was asked by.
		arp(t, hypervisor.NIC{MAC: nics[0].MAC, Taps: nics[0].Taps[1:]})
	})
	t.Run("macvlan", func(t *testing.T) {
		node, pod := newNamespace(t), newNamespace(t)
		node.ip("link add up0 type veth peer name up1", "addr add 10.9.0.1/24 dev up0", "link set up0 up", "link set up1 up")
		node.lacks("macvtap")
		node.ip("link add link up1 name eth0 type macvlan mode bridge")
		if err := node.h.LinkSetNsFd(node.link("eth0"), int(pod.file.Fd())); err != nil {
			t.Fatal(err)
		}
		pod.ip("addr add 10.9.0.2/24 dev eth0", "link set eth0 up")
		before := pod.state()
		n := mustOpen(t, pod, testOptions(t))
		if pod.link("eth0").Attrs().RawFlags&unix.IFF_ALLMULTI == 0 {
			t.Error("the guest does not hear every multicast group")
		}
		arp(t, n.NICs()[0])
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(before, pod.state()); diff != "" {
			t.Errorf("Close left something behind: %s", diff)
		}
	})
	t.Run("a tap of the CNI's", func(t *testing.T) {
		pod := newNamespace(t)
		pod.ip("link add br0 type bridge", "addr add 10.9.0.1/24 dev br0", "tuntap add mode tap tap0",
			"link set br0 addrgenmode none", "link set br0 up", "link set tap0 addrgenmode none", "link set tap0 up master br0")
		mac := pod.link("tap0").Attrs().HardwareAddr
		n := mustOpen(t, pod, testOptions(t))
		nics, guest := n.NICs(), n.Guest().GetInterfaces()
		if len(nics) != 1 || !bytes.Equal(nics[0].MAC, mac) || guest[0].GetMac() != mac.String() || guest[0].GetName() != "tap0" {
			t.Fatalf("NICs %+v, guest %v; want tap0 with MAC %v", nics, guest, mac)
		}
		arp(t, nics[0])
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if now := pod.link("tap0").Attrs().HardwareAddr; !bytes.Equal(now, mac) {
			t.Errorf("Close has left the tap with MAC %v, want %v", now, mac)
		}
	})
	t.Run("a tap that another process has", func(t *testing.T) {
		pod := newNamespace(t)
		pod.ip("tuntap add mode tap tap0", "link set tap0 up")
		far := &Network{ns: pod.file, devices: devices{tun: "/dev/net/tun"}}
		taps, _, err := far.openTap("tap0", 1, false)
		if err != nil {
			t.Fatal(err)
		}
		defer taps[0].Close() //nolint:errcheck // the test's own
		n := mustOpen(t, pod, testOptions(t))
		if _, err := taps[0].Write(append(make([]byte, 10), bytes.Repeat([]byte{0xff}, 60)...)); err != nil {
			t.Fatal(err)
		}
		tap := n.NICs()[0].Taps[0]
		if err := tap.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		frame := make([]byte, 70000)
		for !bytes.HasPrefix(frame[10:], bytes.Repeat([]byte{0xff}, 60)) {
			if _, err := tap.Read(frame); err != nil {
				t.Fatalf("the frame did not come: %v", err)
			}
		}
	})
}

func TestVhostNet(t *testing.T) {
	_, pod := nodeAndPod(t)
	o := testOptions(t)
	o.VhostNet, o.Queues = true, 2
	device := filepath.Join(t.TempDir(), "vhost-net")
	for _, want := range []int{0, 2} { // a host without, and one with
		n, err := open(testContext(t), pod.path, o, devices{tun: "/dev/net/tun", vhost: device})
		if err != nil {
			t.Fatal(err)
		}
		if got := len(n.NICs()[0].Vhost); got != want {
			t.Errorf("%d vhost files, want %d", got, want)
		}
		n.CloseFiles()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(device, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNamespaceWithoutConfiguration(t *testing.T) {
	pod := newNamespace(t)
	pod.ip("link set lo up")
	n := mustOpen(t, pod, testOptions(t))
	if len(n.NICs()) != 0 || len(n.Guest().GetInterfaces()) != 0 || len(n.Guest().GetRoutes()) != 0 {
		t.Errorf("not empty: %v, %v", n.NICs(), n.Guest())
	}
}

// The namespace lives on when its name is deleted, and goes with Close, with all
// that is in it and every file.
func TestNamespaceDeletedUnderIt(t *testing.T) {
	opened := files(t)
	node, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	pod.close()
	arp(t, n.NICs()[0])

	gone, done := make(chan netlink.LinkUpdate), make(chan struct{})
	ns := netnsHandle(node)
	if err := netlink.LinkSubscribeAt(ns, gone, done); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	for timeout := time.After(patience); ; {
		select {
		case u := <-gone:
			if u.Header.Type != unix.RTM_DELLINK || u.Attrs().Name != "p-eth0" {
				continue
			}
		case <-timeout:
			t.Error("the pod's veth is there still: something holds its namespace")
		}
		break
	}
	close(done)
	for range gone { // until the subscription's goroutine has closed its socket
	}
	node.close()
	if diff := cmp.Diff(opened, files(t)); diff != "" {
		t.Errorf("open files: %s", diff)
	}
}

func TestCloseAfterTheInterfaceHasGone(t *testing.T) {
	_, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	n.CloseFiles() // nobody has the tap any more: it vanishes
	pod.ip("link del eth0")
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

// A tap goes with the last process that has it open; its filter stays on the
// interface. The next VM in that namespace starts all the same.
func TestTakesOverWhatAKilledShimLeft(t *testing.T) {
	_, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	_, err := Open(testContext(t), pod.path, testOptions(t))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "joined with another VM already") {
		t.Errorf("a second VM in one namespace: %v", err)
	}
	arp(t, n.NICs()[0]) // has lost nothing
	n.CloseFiles()
	second := mustOpen(t, pod, testOptions(t))
	arp(t, second.NICs()[0])
}

func TestInputThatCannotServe(t *testing.T) {
	node, pod := nodeAndPod(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	before, opened := pod.state(), files(t)
	for _, c := range []struct {
		name, path string
		prepare    string // in the pod, and its undoing
		restore    string
		devices    devices
		is         func(error) bool
		want       string
	}{
		{name: "no such path", path: "/nonexistent/net", is: errdefs.IsNotFound, want: `open network namespace "/nonexistent/net": it does not exist`},
		{name: "a file", path: "/etc/passwd", is: errdefs.IsInvalidArgument, want: "it is no network namespace"},
		{name: "a FIFO", path: fifo, is: errdefs.IsInvalidArgument, want: "it is no network namespace"},
		{name: "another namespace", path: "/proc/self/ns/uts", is: errdefs.IsInvalidArgument, want: "it is no network namespace"},
		{name: "the host's", path: "/proc/self/ns/net", is: errdefs.IsFailedPrecondition, want: "it is the host's own"},
		{name: "no tun", path: pod.path, devices: devices{tun: "/nonexistent/tun"}, is: errdefs.IsFailedPrecondition, want: "modprobe tun"},
		{
			name: "vhost-net that may not be opened", path: pod.path, devices: devices{tun: "/dev/net/tun", vhost: "/"},
			is: errdefs.IsFailedPrecondition, want: "turn vhost-net off",
		},
		{
			name: "same MAC", path: pod.path, is: errdefs.IsInvalidArgument, want: "have the same MAC address",
			prepare: "ip link add x address " + pod.link("eth0").Attrs().HardwareAddr.String() + " up type veth peer name y", restore: "ip link del x",
		},
		{
			name: "tun", path: pod.path, is: errdefs.IsNotImplemented, want: `interface "tun0" (tuntap) is no Ethernet interface`,
			prepare: "ip tuntap add mode tun tun0", restore: "ip tuntap del mode tun tun0",
		},
		{
			name: "somebody's ingress filter", path: pod.path, is: errdefs.IsFailedPrecondition, want: "tc qdisc del dev eth0 ingress",
			prepare: "tc qdisc add dev eth0 ingress", restore: "tc qdisc del dev eth0 ingress",
		},
		{
			name: "somebody's filter", path: pod.path, is: errdefs.IsFailedPrecondition, want: "tc qdisc del dev eth0 ingress",
			prepare: "tc qdisc add dev eth0 clsact", restore: "tc qdisc del dev eth0 clsact",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != "" {
				pod.run(c.prepare)
				defer pod.run(c.restore)
			}
			switch c.name {
			case "tun":
				pod.run("ip link set tun0 up")
			case "somebody's filter", "somebody's ingress filter":
				pod.run("tc filter add dev eth0 ingress prio 1 u32 match u8 0 0 action mirred egress redirect dev lo")
			}
			if c.devices == (devices{}) {
				c.devices.tun = "/dev/net/tun"
			}
			o := testOptions(t)
			o.VhostNet = true
			n, err := open(testContext(t), c.path, o, c.devices)
			if err == nil {
				_ = n.Close()
				t.Fatal("no error")
			}
			if !c.is(err) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("an interface that vanishes meanwhile", func(t *testing.T) {
		n := mustOpen(t, pod, testOptions(t))
		joinPod(node, pod, "brief", "")
		link := pod.link("brief")
		pod.ip("link del brief")
		_, err := n.plug(testContext(t), link)
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `join interface "brief" with the VM`) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v", err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("a context that has ended", func(t *testing.T) {
		ctx, cancel := context.WithCancel(testContext(t))
		cancel()
		if _, err := Open(ctx, pod.path, testOptions(t)); err == nil {
			t.Error("no error")
		}
	})
	if diff := cmp.Diff(before, pod.state()); diff != "" {
		t.Errorf("something is left behind: %s", diff)
	}
	if diff := cmp.Diff(opened, files(t)); diff != "" {
		t.Errorf("open files: %s", diff)
	}
}
