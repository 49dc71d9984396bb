package hypertest

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// Attach implements hypervisor.VM, for a NIC: the guest has it at once, and
// nothing passes through it.
func (v *VM) Attach(ctx context.Context, d hypervisor.Device) error {
	if err := v.usable(ctx); err != nil {
		return fmt.Errorf("attach a %T: %w", d, err)
	}
	if _, ok := d.(hypervisor.NIC); !ok {
		return fmt.Errorf("attach a %T: no such device can be plugged into a running VM: %w", d, errdefs.ErrNotImplemented)
	}
	if err := v.guest.plug(d); err != nil {
		return fmt.Errorf("attach %w", err)
	}
	return nil
}

// Detach implements hypervisor.VM.
func (v *VM) Detach(ctx context.Context, id string) error {
	if i := v.guest.find(id); i < 0 {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("detach network interface %q: %w", id, context.Cause(ctx))
	}
	v.guest.unplug(id)
	return nil
}

func (v *VM) usable(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-v.done:
		return v.ended()
	default:
		return nil
	}
}

// Devices are those that the VM has at this moment, in the order in which they
// came. The files of a NIC are their owner's, and may be closed.
func (g *GuestEnd) Devices() []hypervisor.Device {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.devices)
}

// AwaitDevices waits until the VM's devices are as wanted.
func (g *GuestEnd) AwaitDevices(ctx context.Context, wanted func([]hypervisor.Device) bool) error {
	defer context.AfterFunc(ctx, g.cond.Broadcast)()
	g.mu.Lock()
	defer g.mu.Unlock()
	for !wanted(slices.Clone(g.devices)) {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for devices, which are %v: %w", g.devices, context.Cause(ctx))
		}
		if g.closed {
			return errEnded
		}
		g.cond.Wait()
	}
	return nil
}

func (g *GuestEnd) plug(d hypervisor.Device) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch d := d.(type) {
	case hypervisor.Share:
	case hypervisor.NIC:
		var others []hypervisor.NIC
		for _, o := range g.devices {
			if nic, ok := o.(hypervisor.NIC); ok {
				others = append(others, nic)
			}
		}
		if err := d.Check(others); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%T is of no kind that this backend has", d)
	}
	g.devices = append(g.devices, d)
	g.cond.Broadcast()
	return nil
}

// find returns the index of the NIC of that id, or -1.
func (g *GuestEnd) find(id string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.IndexFunc(g.devices, isNIC(id))
}

func (g *GuestEnd) unplug(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.devices = slices.DeleteFunc(g.devices, isNIC(id))
	g.cond.Broadcast()
}

func isNIC(id string) func(hypervisor.Device) bool {
	return func(d hypervisor.Device) bool {
		nic, ok := d.(hypervisor.NIC)
		return ok && nic.ID == id
	}
}
