package guest

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// Size is what the VM has now; zero for a guest that does not run.
func (g *Guest) Size() hypervisor.Size {
	g.mu.Lock()
	r, ok := g.vm.(hypervisor.Resizer)
	g.mu.Unlock()
	if !ok {
		return hypervisor.Size{}
	}
	return r.Size()
}

// Resize brings the VM to the size that is wanted, and has the guest take into use what
// it gets. It returns what the VM has then: memory that is to go may stay, for a guest
// that cannot do without. Where it cannot grow as far it is an error, and the VM is as
// it was. Calls come one at a time.
func (g *Guest) Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	a, err := g.enter() // a pause waits until this is done
	if err != nil {
		return hypervisor.Size{}, err
	}
	defer g.leave()
	g.mu.Lock()
	r, ok := g.vm.(hypervisor.Resizer)
	g.mu.Unlock()
	if !ok {
		return hypervisor.Size{}, fmt.Errorf("this hypervisor cannot resize a VM: %w", errdefs.ErrNotImplemented)
	}
	before := r.Size()
	s := resizing{g, a, r}
	ctx, cancel := g.Request(ctx)
	defer cancel()
	got, err := s.resize(ctx, before, want)
	if err == nil || got == before {
		return got, err
	}
	undo, cancelUndo := g.Request(context.WithoutCancel(ctx))
	defer cancelUndo()
	got, uerr := s.resize(undo, got, before)
	return got, errors.Join(err, uerr)
}

// resizing is one Resize.
type resizing struct {
	guest *Guest
	agent agentv1.AgentClient
	vm    hypervisor.Resizer
}

func (s resizing) resize(ctx context.Context, from, want hypervisor.Size) (hypervisor.Size, error) {
	has, err := s.online(ctx, min(from.VCPUs, want.VCPUs), 0) // what is to go is let go of first
	if err != nil {
		return from, err
	}
	got, err := s.vm.Resize(ctx, want)
	if err != nil || got == from {
		return got, err
	}
	// The guest's kernel does not tell the agent of all that goes: it is told here.
	plugged := uint64(max(0, got.MemoryMiB-from.MemoryMiB)) << 20
	if got.VCPUs <= from.VCPUs && got.MemoryMiB == from.MemoryMiB {
		return got, nil
	}
	if plugged > 0 {
		plugged += has.MemoryBytes
	}
	has, err = s.online(ctx, got.VCPUs, plugged)
	if err == nil && int(has.Cpus) < got.VCPUs {
		err = fmt.Errorf("the guest uses %d of its %d CPUs: %w", has.Cpus, got.VCPUs, errdefs.ErrUnavailable)
	}
	return got, err
}

// online has the guest use so many CPUs, and wait for its memory to be so much.
func (s resizing) online(ctx context.Context, cpus int, memory uint64) (*agentv1.OnlineResourcesResponse, error) {
	var resp *agentv1.OnlineResourcesResponse
	err := s.guest.call(ctx, s.agent, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.OnlineResources(ctx, &agentv1.OnlineResourcesRequest{Cpus: uint32(cpus), MemoryBytes: memory})
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	return resp, err
}
