package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/memfd"
)

const (
	// spareMiB is what a guest keeps of the memory that it could do without, so that
	// giving up the rest does not have it kill anything.
	spareMiB = 32
	// leastMiB of what a VM was booted with a balloon leaves; of what was plugged, all.
	leastMiB = 64
	// deflateTimeout bounds how long it may take to let the guest have its memory again.
	deflateTimeout = 10 * time.Second
)

// Reclaim has the guest give up what it can do without, such as its page cache, and
// returns what the host held of its memory before and holds after, in MiB. The guest may
// take it again as it needs it.
func (g *Guest) Reclaim(ctx context.Context) (before, after int, err error) {
	a, err := g.enter()
	if err != nil {
		return 0, 0, err
	}
	defer g.leave()
	g.mu.Lock()
	vm := g.vm
	g.mu.Unlock()
	b, ok := vm.(hypervisor.Balloon)
	r, sized := vm.(hypervisor.Resizer)
	if !ok || !sized {
		return 0, 0, fmt.Errorf("this hypervisor cannot take memory from a VM: %w", errdefs.ErrNotImplemented)
	}
	if before, err = heldMiB(vm.PID()); err != nil {
		return 0, 0, err
	}
	has, err := resizing{g, a, r}.online(ctx, 0, 0)
	if err != nil {
		return 0, 0, err
	}
	size := r.Size().MemoryMiB
	if spare := int(has.AvailableBytes>>20) - spareMiB; spare > 0 {
		_, err = b.SetMemory(ctx, max(size-spare, size-g.bootMiB+leastMiB))
		// Whatever came of it, and of ctx.
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deflateTimeout)
		defer cancel()
		_, derr := b.SetMemory(dctx, size)
		err = errors.Join(err, derr)
	}
	if held, herr := heldMiB(vm.PID()); herr == nil {
		return before, held, err
	}
	return before, before, err
}

// heldMiB is what the host holds of the memory of the VM whose monitor has that process
// id, in MiB.
func heldMiB(pid int) (int, error) {
	n, err := memfd.Held(pid)
	return int(n >> 20), err
}
