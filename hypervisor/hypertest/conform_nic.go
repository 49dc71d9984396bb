package hypertest

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// A NICSubject is a backend with a guest that tells of its network interfaces. Of
// the guest is expected what Subject says, but for the port.
type NICSubject struct {
	Hypervisor hypervisor.Hypervisor
	// Config of the guest.
	Config hypervisor.Config
	// NIC makes a valid one: eth0, eth1 and so on, each with an address of its
	// own. Its files are open until the end of the test.
	NIC func(t *testing.T, number byte) hypervisor.NIC
	// Await waits until the guest has an interface with that address, or has none.
	Await func(ctx context.Context, vm hypervisor.VM, mac net.HardwareAddr, there bool) error
}

// ConformNIC is what the layers above rely on where network interfaces are
// concerned, as tests. make is called for each of them; it may skip.
func ConformNIC(t *testing.T, make func(t *testing.T) NICSubject) {
	for _, c := range []struct {
		name string
		test func(context.Context, *testing.T, NICSubject)
	}{
		{"an invalid interface is an error", testInvalidNIC},
		{"interfaces come and go", testComeAndGo},
		{"Attach refuses what cannot be", testAttachRefuses},
		{"Attach and Detach of an ended VM", testPlugEnded},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
			t.Cleanup(cancel)
			c.test(ctx, t, make(t))
		})
	}
}

// boot starts a VM with the NICs and waits until the guest is ready.
func (s NICSubject) boot(ctx context.Context, t *testing.T, nics ...hypervisor.NIC) hypervisor.VM {
	t.Helper()
	cfg := s.Config
	cfg.Devices = slices.Clone(cfg.Devices)
	for _, n := range nics {
		cfg.Devices = append(cfg.Devices, n)
	}
	c := &conformance{Subject{Hypervisor: s.Hypervisor, Config: cfg}, ctx}
	vm := c.start(t)
	c.accept(t, vm)
	return vm
}

func (s NICSubject) await(ctx context.Context, t *testing.T, vm hypervisor.VM, nic hypervisor.NIC, there bool) {
	t.Helper()
	if err := s.Await(ctx, vm, nic.MAC, there); err != nil {
		t.Fatalf("wait for %s, there: %v: %v", nic.MAC, there, err)
	}
}

func testInvalidNIC(ctx context.Context, t *testing.T, s NICSubject) {
	multicast := s.NIC(t, 0)
	multicast.MAC = bytes.Clone(multicast.MAC)
	multicast.MAC[0] |= 1
	fileless := s.NIC(t, 1)
	fileless.Taps, fileless.Stream = nil, nil
	twice := s.NIC(t, 2)
	for name, nics := range map[string][]hypervisor.NIC{
		"a multicast address": {multicast}, "no file": {fileless}, "one twice": {twice, twice},
	} {
		cfg := s.Config
		cfg.Devices = slices.Clone(cfg.Devices)
		for _, n := range nics {
			cfg.Devices = append(cfg.Devices, n)
		}
		if vm, err := s.Hypervisor.Start(ctx, cfg); err == nil {
			vm.Stop(ctx) //nolint:errcheck // it failed already
			t.Errorf("Start with %s succeeded", name)
		}
	}
}

func testComeAndGo(ctx context.Context, t *testing.T, s NICSubject) {
	first, second := s.NIC(t, 0), s.NIC(t, 1)
	vm := s.boot(ctx, t, first)
	s.await(ctx, t, vm, first, true)
	s.await(ctx, t, vm, second, false)
	if err := vm.Attach(ctx, second); err != nil {
		t.Fatalf("Attach: %v", err)
	}
	s.await(ctx, t, vm, second, true)
	for _, gone := range []hypervisor.NIC{first, second} { // from the start, or attached
		for range 2 {
			if err := vm.Detach(ctx, gone.ID); err != nil {
				t.Fatalf("Detach %s: %v", gone.ID, err)
			}
		}
		s.await(ctx, t, vm, gone, false)
	}
	if err := vm.Detach(ctx, "never-there"); err != nil {
		t.Errorf("Detach of nothing: %v", err)
	}
	again := s.NIC(t, 2)
	again.ID, again.MAC = second.ID, second.MAC // they are free
	if err := vm.Attach(ctx, again); err != nil {
		t.Fatalf("Attach: %v", err)
	}
	s.await(ctx, t, vm, again, true)
}

func testAttachRefuses(ctx context.Context, t *testing.T, s NICSubject) {
	first, second := s.NIC(t, 0), s.NIC(t, 1)
	vm := s.boot(ctx, t, first)
	if err := vm.Attach(ctx, alien{}); !errdefs.IsNotImplemented(err) {
		t.Errorf("Attach of an unknown kind: %v, want ErrNotImplemented", err)
	}
	if err := vm.Attach(ctx, hypervisor.Share{Tag: "more", Dir: t.TempDir()}); !errdefs.IsNotImplemented(err) {
		t.Errorf("Attach of a share: %v, want ErrNotImplemented", err)
	}
	sameID, sameMAC, invalid := second, second, second
	sameID.ID = first.ID
	sameMAC.MAC = first.MAC
	invalid.MTU = 0
	for name, nic := range map[string]hypervisor.NIC{"id": sameID, "address": sameMAC} {
		if err := vm.Attach(ctx, nic); !errdefs.IsAlreadyExists(err) {
			t.Errorf("Attach with the %s of another: %v, want ErrAlreadyExists", name, err)
		}
	}
	if err := vm.Attach(ctx, invalid); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Attach of an invalid one: %v, want ErrInvalidArgument", err)
	}
	ended, end := context.WithCancelCause(ctx)
	why := errors.New("given up")
	end(why)
	if err := vm.Attach(ended, second); !errors.Is(err, why) {
		t.Errorf("Attach with an ended context: %v, want its cause", err)
	}
	if err := vm.Detach(ended, first.ID); !errors.Is(err, why) {
		t.Errorf("Detach with an ended context: %v, want its cause", err)
	}
	// Nothing of all that is in the way.
	if err := vm.Attach(ctx, second); err != nil {
		t.Fatalf("Attach: %v", err)
	}
	s.await(ctx, t, vm, second, true)
	if err := vm.Detach(ctx, first.ID); err != nil {
		t.Fatalf("Detach: %v", err)
	}
	s.await(ctx, t, vm, first, false)
}

func testPlugEnded(ctx context.Context, t *testing.T, s NICSubject) {
	first := s.NIC(t, 0)
	vm := s.boot(ctx, t, first)
	if err := vm.Stop(ctx); err != nil {
		t.Fatalf("Stop: %v", err)
	}
	if err := vm.Attach(ctx, s.NIC(t, 1)); err == nil {
		t.Error("Attach to an ended VM succeeded")
	}
	if err := vm.Detach(ctx, first.ID); err != nil {
		t.Errorf("Detach from an ended VM: %v", err)
	}
}
