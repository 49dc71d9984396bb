package network

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/husk-containers/husk/hypervisor"
)

// A watcher is a VM that follows its namespace. It has no devices, but their ids.
type watcher struct {
	t       *testing.T
	changes chan Change
	stop    context.CancelFunc
	done    chan error
}

func watch(t *testing.T, n *Network, attach func(hypervisor.NIC)) *watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{t: t, changes: make(chan Change, 1000), stop: cancel, done: make(chan error, 1)}
	go func() {
		w.done <- n.Watch(ctx, func(_ context.Context, c Change) {
			for _, nic := range c.Added {
				attach(nic)
			}
			w.changes <- c
		})
	}()
	t.Cleanup(cancel)
	return w
}

// until waits for a change that serves.
func (w *watcher) until(what string, serves func(Change) bool) Change {
	w.t.Helper()
	for timeout := time.After(patience); ; {
		select {
		case c := <-w.changes:
			if serves(c) {
				return c
			}
		case err := <-w.done:
			w.t.Fatalf("Watch has ended: %v", err)
		case <-timeout:
			w.t.Fatalf("no change: %s", what)
		}
	}
}

func TestFollowsTheNamespace(t *testing.T) {
	node, pod := nodeAndPod(t)
	before := pod.state()
	n := mustOpen(t, pod, testOptions(t))
	pod.ip("addr add 10.9.0.20/24 dev eth0") // before anybody watches
	var files []hypervisor.NIC
	w := watch(t, n, func(nic hypervisor.NIC) {
		if len(nic.Taps) != 1 {
			t.Errorf("a NIC with %d taps", len(nic.Taps))
		}
		files = append(files, nic)
	})
	has := func(i int, address string) func(Change) bool {
		return func(c Change) bool {
			all := c.Guest.GetInterfaces()
			return len(all) > i && slices.Contains(all[i].GetAddresses(), address)
		}
	}
	w.until("an address before Watch", has(0, "10.9.0.20/24"))

	pod.ip("addr add 10.9.0.21/24 dev eth0")
	w.until("an address", has(0, "10.9.0.21/24"))
	pod.ip("addr add fd09::21/64 dev eth0 nodad")
	w.until("an IPv6 address", has(0, "fd09::21/64"))
	pod.ip("addr del 10.9.0.21/24 dev eth0")
	w.until("an address less", func(c Change) bool { return !has(0, "10.9.0.21/24")(c) })

	pod.ip("route add 10.96.0.0/12 via 10.9.0.1")
	w.until("a route", func(c Change) bool { return hasRoute(c, "10.96.0.0/12") })
	pod.ip("-6 route add fd96::/64 via fd09::1")
	w.until("an IPv6 route", func(c Change) bool { return hasRoute(c, "fd96::/64") })
	pod.ip("neigh add 10.9.0.77 lladdr 0a:00:00:00:00:77 dev eth0 nud permanent")
	w.until("a neighbour", func(c Change) bool { return len(c.Guest.GetNeighbours()) == 1 })
	pod.ip("link set eth0 mtu 1300")
	w.until("a lower MTU", func(c Change) bool {
		return c.Guest.GetInterfaces()[0].GetMtu() == 1300 && len(c.Added) == 0 && len(c.Removed) == 0
	})

	joinPod(node, pod, "net1", "")
	added := w.until("an interface", func(c Change) bool { return len(c.Added) > 0 }).Added[0]
	if want := pod.link("net1").Attrs().HardwareAddr; !bytes.Equal(added.MAC, want) {
		t.Errorf("added %+v, want MAC %v", added, want)
	}
	pod.ip("addr add 10.10.0.2/24 dev net1")
	w.until("its address", has(1, "10.10.0.2/24"))
	pod.ip("link set net1 address 0a:00:00:00:00:99")
	if c := w.until("the device of the old MAC address leaves", func(c Change) bool { return len(c.Removed) > 0 }); c.Removed[0] != added.ID {
		t.Errorf("removed %v, want %v", c.Removed, added.ID)
	}
	renewed := w.until("one with the new comes", func(c Change) bool { return len(c.Added) > 0 }).Added[0]
	if renewed.MAC.String() != "0a:00:00:00:00:99" || renewed.ID == added.ID {
		t.Errorf("added %+v after %+v", renewed, added)
	}
	node.ip("link del p-net1")
	gone := w.until("an interface less", func(c Change) bool { return len(c.Removed) > 0 })
	if !slices.Equal(gone.Removed, []string{renewed.ID}) || len(gone.Guest.GetInterfaces()) != 1 {
		t.Errorf("removed %v, guest %v", gone.Removed, gone.Guest)
	}
	if len(n.NICs()) != 1 {
		t.Errorf("NICs %+v", n.NICs())
	}

	w.stop()
	if err := <-w.done; err != nil {
		t.Errorf("Watch: %v", err)
	}
	for _, nic := range files {
		if err := nic.Taps[0].Close(); err == nil {
			t.Error("a tap's file is open after it was attached")
		}
	}
	// Once more, until Close.
	w = watch(t, n, func(hypervisor.NIC) {})
	pod.ip("link set eth0 mtu 1400", "neigh del 10.9.0.77 dev eth0", "route del 10.96.0.0/12", "-6 route del fd96::/64",
		"addr del 10.9.0.20/24 dev eth0", "addr del fd09::21/64 dev eth0")
	w.until("the second Watch", func(c Change) bool { return len(c.Guest.GetInterfaces()[0].GetAddresses()) == 2 })
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := <-w.done; err != nil {
		t.Errorf("Watch: %v", err)
	}
	if err := n.Watch(testContext(t), nil); err != nil {
		t.Errorf("Watch after Close: %v", err)
	}
	if diff := cmp.Diff(before, pod.state()); diff != "" {
		t.Errorf("Close left something behind: %s", diff)
	}
}

func hasRoute(c Change, destination string) bool {
	for _, r := range c.Guest.GetRoutes() {
		if r.GetDestination() == destination {
			return true
		}
	}
	return false
}

// A state that no VM can have is passed over; the next that one can have is taken.
func TestFollowsAgainAfterWhatNoVMCanHave(t *testing.T) {
	_, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	w := watch(t, n, func(hypervisor.NIC) {})
	pod.ip("addr add 10.7.0.2/24 dev eth0")
	w.until("an address", func(Change) bool { return true })
	if err := n.Watch(testContext(t), nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second Watch: %v", err)
	}
	mac := pod.link("eth0").Attrs().HardwareAddr.String()
	pod.ip("link add x type veth peer name y", "link set x address "+mac, "link set x up", "addr add 10.8.0.2/24 dev eth0")
	pod.ip("link set x address 0a:00:00:00:00:98")
	c := w.until("the other address", func(c Change) bool { return len(c.Added) > 0 })
	if all := c.Guest.GetInterfaces(); len(all) != 2 || !slices.Contains(all[0].GetAddresses(), "10.8.0.2/24") {
		t.Errorf("guest %v", all)
	}
}

// Close does not wait for a VM that takes its time with a device.
func TestCloseEndsAnAttachment(t *testing.T) {
	node, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	attaching, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- n.Watch(context.Background(), func(ctx context.Context, c Change) {
			if len(c.Added) > 0 {
				close(attaching)
				<-ctx.Done()
			}
		})
	}()
	joinPod(node, pod, "net1", "")
	<-attaching
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Watch: %v", err)
	}
	if out := pod.run("ip -o link") + pod.run("tc qdisc"); strings.Contains(out, "husk") || strings.Contains(out, "ingress") {
		t.Errorf("Close left something behind: %s", out)
	}
}

// Whoever floods the socket's queue loses messages, not changes.
func TestLosesNoChangeToAFullQueue(t *testing.T) {
	_, pod := nodeAndPod(t)
	n := mustOpen(t, pod, testOptions(t))
	var batch strings.Builder
	for range 2000 {
		batch.WriteString("neigh replace 10.9.0.77 lladdr 0a:00:00:00:00:77 dev eth0 nud permanent\nneigh del 10.9.0.77 dev eth0\n")
	}
	batch.WriteString("addr add 10.8.0.2/24 dev eth0\n")
	pod.batch(batch.String())
	w := watch(t, n, func(hypervisor.NIC) {})
	c := w.until("the address", func(Change) bool { return true })
	if all := c.Guest.GetInterfaces(); !slices.Contains(all[0].GetAddresses(), "10.8.0.2/24") {
		t.Errorf("guest %v", all)
	}
}
