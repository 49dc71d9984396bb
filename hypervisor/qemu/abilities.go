package qemu

import (
	"context"
	"errors"
	"fmt"

	"github.com/husk-containers/husk/hypervisor"
)

// Pause implements hypervisor.Pauser.
func (v *vm) Pause(ctx context.Context) error { return v.tell(ctx, "pause the VM", "stop") }

// Resume implements hypervisor.Pauser.
func (v *vm) Resume(ctx context.Context) error { return v.tell(ctx, "resume the VM", "cont") }

func (v *vm) tell(ctx context.Context, what, command string) error {
	if err := v.qmp.Execute(ctx, command, nil, nil); err != nil {
		return fmt.Errorf("%s: %w", what, v.whyNot(err))
	}
	return nil
}

// Size implements hypervisor.Resizer.
func (v *vm) Size() hypervisor.Size {
	return hypervisor.Size{VCPUs: v.cpus.Count(), MemoryMiB: v.memory.MiB()}
}

// Resize implements hypervisor.Resizer: memory and vCPUs are tried both, whatever
// becomes of the one.
func (v *vm) Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	if err := want.Check(hypervisor.Size{VCPUs: v.cpus.Max(), MemoryMiB: v.memory.Max()}); err != nil {
		return v.Size(), fmt.Errorf("resize the VM: %w", err)
	}
	if err := v.takeTurn(ctx); err != nil {
		return v.Size(), fmt.Errorf("resize the VM: %w", err)
	}
	defer v.endTurn()
	if err := errors.Join(v.cpus.Resize(ctx, want.VCPUs), v.memory.Resize(ctx, want.MemoryMiB)); err != nil {
		return v.Size(), fmt.Errorf("resize the VM: %w", v.whyNot(err))
	}
	return v.Size(), nil
}

// SetMemory implements hypervisor.Balloon.
func (v *vm) SetMemory(ctx context.Context, mib int) (int, error) {
	if err := v.takeTurn(ctx); err != nil {
		return 0, fmt.Errorf("set the guest's memory: %w", err)
	}
	defer v.endTurn()
	got, err := v.memory.SetBalloon(ctx, mib)
	if err != nil {
		err = fmt.Errorf("set the guest's memory: %w", v.whyNot(err))
	}
	return got, err
}

// VCPUThreads implements hypervisor.Placer.
func (v *vm) VCPUThreads(ctx context.Context) (map[int]int, error) {
	threads, err := v.cpus.Threads(ctx, v.child.PID())
	if err != nil {
		return nil, v.whyNot(err)
	}
	return threads, nil
}

// takeTurn waits until nobody else changes the VM's size.
func (v *vm) takeTurn(ctx context.Context) error {
	if ctx.Err() != nil { // a select would choose at random
		return context.Cause(ctx)
	}
	select {
	case v.turn <- struct{}{}:
		return nil
	case <-v.done:
		return v.because(errors.New("the VM has ended"))
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (v *vm) endTurn() { <-v.turn }
