package guest

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// VCPUThreads returns the host's thread ids of the vCPUs, by their numbers. It is
// NotImplemented where the VM's threads cannot be told apart.
func (g *Guest) VCPUThreads(ctx context.Context) (map[int]int, error) {
	g.mu.Lock()
	vm := g.vm
	g.mu.Unlock()
	if vm == nil {
		return nil, g.notRunning()
	}
	p, ok := vm.(hypervisor.Placer)
	if !ok {
		return nil, fmt.Errorf("this hypervisor does not tell the threads of vCPUs: %w", errdefs.ErrNotImplemented)
	}
	return p.VCPUThreads(ctx)
}
