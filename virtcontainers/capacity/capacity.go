// Package capacity is what a VM has, and which part of it a container may use: the VM
// grows and shrinks with the limits of its containers, and its vCPUs run where their
// cpusets say.
package capacity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/resource"
)

// A Machine is the VM; a guest.Guest is one.
type Machine interface {
	Size() hypervisor.Size
	// Resize brings it to a size, or near to a smaller one, and returns what it has then.
	Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error)
	// VCPUThreads returns the host's thread ids of the vCPUs, by their numbers.
	VCPUThreads(ctx context.Context) (map[int]int, error)
}

// Options is what a Table is made of.
type Options struct {
	Machine Machine
	Boot    Boot
	// Confine has a container, by id, run on those CPUs of the guest alone; empty: on all.
	Confine func(ctx context.Context, id, cpus string) error
	// Processes are the host's that work for the VM.
	Processes func() []int
	// BindMemory moves what the processes have, and the guest's memory, to nodes of the
	// host; nil: to any.
	BindMemory func(nodes []int) error
	Log        *slog.Logger
}

// A Table has the claims of a VM's containers. Its methods are safe for concurrent use,
// and what changes the VM comes in turn.
type Table struct {
	o    Options
	turn chan struct{} // of who changes the VM; holds one

	mu     sync.Mutex
	claims map[string]Claim
	plan   *plan // nil: nobody was bound to anything yet
}

// New returns a table without claims.
func New(o Options) *Table {
	return &Table{o: o, turn: make(chan struct{}, 1), claims: map[string]Claim{}}
}

// Change has the container of that id claim c from now on, which it may not have done
// before: the VM grows where that is needed, apply is told which of the VM's CPUs the
// container is confined to (empty: none), and then the VM shrinks where that is possible.
// On error, apply's or another, everything is as it was.
func (t *Table) Change(ctx context.Context, id string, c Claim, apply func(cpus string) error) (err error) {
	if err := t.lock(ctx); err != nil {
		return err
	}
	defer t.unlock()
	claims, before := t.current()
	next := maps.Clone(claims)
	next[id] = c
	want, err := t.size(next)
	if err != nil {
		return err
	}
	plan, err := t.place(want.VCPUs, next)
	if err != nil {
		return err
	}
	had := t.o.Machine.Size()
	grown := hypervisor.Size{VCPUs: max(had.VCPUs, want.VCPUs), MemoryMiB: max(had.MemoryMiB, want.MemoryMiB)}
	if err := t.resize(ctx, had, grown); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			ctx := context.WithoutCancel(ctx)
			err = errors.Join(err, t.enact(ctx, before, id), t.resize(ctx, grown, had))
		}
	}()
	if err := t.enact(ctx, plan, id); err != nil {
		return err
	}
	if err := apply(plan.cpus(id)); err != nil {
		return err
	}
	t.mu.Lock()
	t.claims[id] = c
	t.mu.Unlock()
	t.shrink(ctx, want)
	return nil
}

// Claim returns what the container of that id claims.
func (t *Table) Claim(id string) Claim {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.claims[id]
}

// Drop ends a container's claim. The VM is as it was until Settle.
func (t *Table) Drop(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.claims, id)
}

// Settle gives back what no container claims any more.
func (t *Table) Settle(ctx context.Context) {
	if t.lock(ctx) != nil {
		return
	}
	defer t.unlock()
	claims, _ := t.current()
	want, err := t.size(claims)
	if err != nil {
		t.o.Log.Error("size the VM for the containers that are left", "err", err)
		return
	}
	plan, err := t.place(want.VCPUs, claims)
	if err == nil {
		err = t.enact(ctx, plan, "")
	}
	if err != nil {
		t.o.Log.Warn("what an ended container had is not given to the others", "err", err)
	}
	t.shrink(ctx, want)
}

// Placement is where the VM runs; nil: anywhere.
func (t *Table) Placement() *placement.Plan {
	_, plan := t.current()
	if plan == nil {
		return nil
	}
	return &plan.Plan
}

func (t *Table) current() (map[string]Claim, *plan) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.claims), t.plan
}

func (t *Table) lock(ctx context.Context) error {
	select {
	case t.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the VM is being changed: %w", context.Cause(ctx))
	}
}

func (t *Table) unlock() { <-t.turn }

// size is what the VM needs for the claims.
func (t *Table) size(claims map[string]Claim) (hypervisor.Size, error) {
	limits := map[string]resource.Limits{}
	for id, c := range claims {
		var err error
		if limits[id], err = resource.OfSpec(c.Resources); err != nil {
			return hypervisor.Size{}, err
		}
	}
	s, err := t.o.Boot.Bounds.Grown(t.o.Boot.Size, limits)
	return hypervisor.Size(s), err
}

// shrink has the VM give up what it has beyond want, as far as the guest can.
func (t *Table) shrink(ctx context.Context, want hypervisor.Size) {
	has := t.o.Machine.Size()
	to := hypervisor.Size{VCPUs: min(has.VCPUs, want.VCPUs), MemoryMiB: min(has.MemoryMiB, want.MemoryMiB)}
	if err := t.resize(ctx, has, to); err != nil {
		t.o.Log.Warn("the VM keeps more than its containers ask for", "vcpus", has.VCPUs, "memory_mib", has.MemoryMiB, "err", err)
	}
}

func (t *Table) resize(ctx context.Context, from, to hypervisor.Size) error {
	if from == to {
		return nil
	}
	got, err := t.o.Machine.Resize(ctx, to)
	if err != nil {
		return fmt.Errorf("resize the VM from %s to %s: %w", text(from), text(to), err)
	}
	if got != from {
		t.o.Log.Info("sandbox resized", "vcpus", got.VCPUs, "memory_mib", got.MemoryMiB, "asked", text(to))
	}
	return nil
}

func text(s hypervisor.Size) string {
	return fmt.Sprintf("%d vCPUs and %d MiB", s.VCPUs, s.MemoryMiB)
}
