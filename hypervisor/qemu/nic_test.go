package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/husk-containers/husk/hypervisor"
)

// trafficTimeout bounds a test that boots a guest and passes a few MiB through it,
// under KVM that is emulated too.
const trafficTimeout = 6 * time.Minute

// bootGuest boots the test's guest with the devices and returns when it is ready.
func bootGuest(ctx context.Context, t *testing.T, vcpus int, devices ...hypervisor.Device) hypervisor.VM {
	t.Helper()
	q, cfg := testGuest(t)
	cfg.VCPUs = vcpus
	cfg.Devices = append(cfg.Devices, devices...)
	vm, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	control, err := vm.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() }) //nolint:errcheck // the VM may have ended
	return vm
}

// setUp gives the n-th NIC the address 10.0.n.2/24 in the guest.
func setUp(ctx context.Context, t *testing.T, vm hypervisor.VM, n byte) {
	t.Helper()
	if _, err := tell(ctx, vm, "up %s 10.0.%d.2/24", mac(n), n); err != nil {
		t.Fatal(err)
	}
}

func TestFramesPassBothWays(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	ns := newNamespace(t)
	jumbo := ns.onTap(t, 2, 2)
	jumbo.MTU = 9000
	vm := bootGuest(ctx, t, 2, ns.onTap(t, 1, 1), jumbo)
	t.Run("one queue", func(t *testing.T) {
		setUp(ctx, t, vm, 1)
		ns.echo(ctx, t, "10.0.1.2")
	})
	t.Run("two queues and a large MTU", func(t *testing.T) {
		got, err := tell(ctx, vm, "up %s 10.0.2.2/24", mac(2))
		var name string
		var mtu int
		if _, scanErr := fmt.Sscan(got, &name, &mtu); err != nil || scanErr != nil || mtu != 9000 {
			t.Errorf("the guest has %q, %v; want an MTU of 9000", got, err)
		}
		ns.echo(ctx, t, "10.0.2.2")
	})
	t.Run("mirrored to another interface", func(t *testing.T) {
		// What a pod has: offloads of a real connection cross from tap to veth.
		pod, node := newNamespace(t), newNamespace(t)
		pod.do(t, "make a pair", func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "eth0"
			peer, err := os.Open(node.dir + "/ns/net")
			if err != nil {
				return err
			}
			defer peer.Close()
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "veth0", PeerNamespace: netlink.NsFd(peer.Fd())})
		})
		nic := hypervisor.NIC{ID: "pod", MAC: mac(3), MTU: 1500, Taps: pod.tap(t, "tap0", 1)}
		pod.up(t, "tap0", "")
		pod.up(t, "eth0", "")
		pod.mirror(t, "eth0", "tap0")
		node.up(t, "veth0", "10.0.3.1/24")
		if err := vm.Attach(ctx, nic); err != nil {
			t.Fatal(err)
		}
		setUp(ctx, t, vm, 3)
		node.echo(ctx, t, "10.0.3.2")
	})
	t.Run("a stream", func(t *testing.T) {
		testStream(ctx, t, vm)
	})
}

// TestVhostNICsPassFrames has the host's kernel copy frames, for a device from the
// start and for one plugged.
func TestVhostNICsPassFrames(t *testing.T) {
	vhost := func(nic hypervisor.NIC) hypervisor.NIC {
		for range nic.Taps {
			f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
			if err != nil {
				t.Skipf("no vhost-net: %v", err)
			}
			t.Cleanup(func() { f.Close() })
			nic.Vhost = append(nic.Vhost, f)
		}
		return nic
	}
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	ns := newNamespace(t)
	vm := bootGuest(ctx, t, 2, vhost(ns.onTap(t, 1, 2)))
	setUp(ctx, t, vm, 1)
	ns.echo(ctx, t, "10.0.1.2")
	if err := vm.Attach(ctx, vhost(ns.onTap(t, 2, 1))); err != nil {
		t.Fatal(err)
	}
	setUp(ctx, t, vm, 2)
	ns.echo(ctx, t, "10.0.2.2")
	for _, id := range []string{"eth1", "eth2"} {
		if err := vm.Detach(ctx, id); err != nil {
			t.Error(err)
		}
	}
}

// testStream asks the guest by ARP for its address, over a stream of frames.
func testStream(ctx context.Context, t *testing.T, vm hypervisor.VM) {
	peer, file, err := socketpair("stream")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	err = vm.Attach(ctx, hypervisor.NIC{ID: "user", MAC: mac(4), MTU: 65520, Stream: file})
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	setUp(ctx, t, vm, 4)
	ours := net.HardwareAddr{2, 0, 0, 0, 0, 0xfe}
	arp := func(op byte, from net.HardwareAddr, fromIP byte, to net.HardwareAddr, toIP byte) []byte { // RFC 826
		p := []byte{0, 1, 8, 0, 6, 4, 0, op}
		p = append(append(p, from...), 10, 0, 4, fromIP)
		return append(append(p, to...), 10, 0, 4, toIP)
	}
	request := append(bytes.Repeat([]byte{0xff}, 6), ours...)
	request = append(append(request, 8, 6), arp(1, ours, 1, make([]byte, 6), 2)...)
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)
	if _, err := peer.Write(frame); err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(ctx, func() { peer.Close() })()
	want := append(append(append([]byte(nil), ours...), mac(4)...), 8, 6)
	want = append(want, arp(2, mac(4), 2, ours, 1)...)
	for { // the guest's own come first: it asks for routers
		var length [4]byte
		if _, err := io.ReadFull(peer, length[:]); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, binary.BigEndian.Uint32(length[:]))
		if _, err := io.ReadFull(peer, got); err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(got, want) {
			break
		}
	}
	if err := vm.Detach(ctx, "user"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, peer); err != nil {
		t.Errorf("read after the device went: %v, want the end", err)
	}
}

func TestEverySlotTakesANIC(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	vm := bootGuest(ctx, t, 1)
	stream := func(n byte) hypervisor.NIC {
		_, file, err := socketpair("stream")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		return hypervisor.NIC{ID: fmt.Sprintf("eth%d", n), MAC: mac(n), MTU: 1500, Stream: file}
	}
	for n := range byte(maxNICs) {
		if err := vm.Attach(ctx, stream(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := vm.Attach(ctx, stream(maxNICs)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("Attach to a full VM: %v, want that it is full", err)
	}
	setUp(ctx, t, vm, maxNICs-1)
	start := time.Now()
	if err := vm.Detach(ctx, "eth0"); err != nil {
		t.Fatal(err)
	}
	t.Logf("Detach took %v", time.Since(start))
	if err := vm.Attach(ctx, stream(maxNICs)); err != nil {
		t.Error(err)
	}
	start = time.Now()
	setUp(ctx, t, vm, maxNICs)
	t.Logf("plugged and up after %v", time.Since(start))
}

func TestDetachCanBeTakenUpAgain(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	ns := newNamespace(t)
	nic := ns.onTap(t, 1, 1)
	machine := bootGuest(ctx, t, 1, nic).(*vm)
	execute := func(command string) {
		t.Helper()
		if err := machine.qmp.Execute(ctx, command, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	execute("stop") // a guest that does not answer
	for range 2 {
		short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		err := machine.Detach(short, nic.ID)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "has not let go") {
			t.Errorf("Detach from a guest that stands still: %v", err)
		}
	}
	if err := machine.Attach(ctx, nic); !errdefs.IsAlreadyExists(err) {
		t.Errorf("Attach of a NIC that is still there: %v", err)
	}
	execute("cont")
	if err := machine.Detach(ctx, nic.ID); err != nil {
		t.Fatal(err)
	}
	again := nic
	again.Taps = ns.tap(t, "again", 1)
	ns.up(t, "again", "10.0.9.1/24")
	if err := machine.Attach(ctx, again); err != nil {
		t.Fatal(err)
	}
	if _, err := tell(ctx, machine, "up %s 10.0.9.2/24", nic.MAC); err != nil {
		t.Fatal(err)
	}
	ns.echo(ctx, t, "10.0.9.2")
}

func TestAttachUnwinds(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	vm := bootGuest(ctx, t, 1)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	nic := hypervisor.NIC{ID: "eth0", MAC: mac(1), MTU: 1500, Stream: w}
	if err := vm.Attach(ctx, nic); err == nil {
		t.Error("a pipe was taken for a socket")
	}
	w.Close()
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read from a file that was passed: %v, want the end: QEMU has kept it", err)
	}
	ended, end := context.WithCancel(ctx)
	end()
	ns := newNamespace(t)
	nic = ns.onTap(t, 1, 1)
	if err := vm.Attach(ended, nic); err == nil {
		t.Error("Attach succeeded with an ended context")
	}
	if err := vm.Attach(ctx, nic); err != nil { // nothing of the others is in the way
		t.Error(err)
	}
	setUp(ctx, t, vm, 1)
	ns.echo(ctx, t, "10.0.1.2")
}
