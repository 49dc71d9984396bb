package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
)

const (
	// spareMiB is what a guest keeps of the memory that it could do without, so that
	// giving up the rest does not have it kill anything.
	spareMiB = 32
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
	if before, err = HeldMiB(vm.PID()); err != nil {
		return 0, 0, err
	}
	has, err := resizing{g, a, r}.online(ctx, 0, 0)
	if err != nil {
		return 0, 0, err
	}
	size := r.Size().MemoryMiB
	if spare := int(has.AvailableBytes>>20) - spareMiB; spare > 0 {
		_, err = b.SetMemory(ctx, size-min(spare, size))
		// Whatever came of it, and of ctx.
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deflateTimeout)
		defer cancel()
		_, derr := b.SetMemory(dctx, size)
		err = errors.Join(err, derr)
	}
	if after, herr := HeldMiB(vm.PID()); herr == nil {
		return before, after, err
	}
	return before, before, err
}

// HeldMiB is what the host holds of the memory of the VM whose monitor has that process
// id, in MiB: the blocks of its memory files.
func HeldMiB(pid int) (int, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("find the memory of the VM: %w", err)
	}
	var blocks int64
	seen := map[uint64]bool{}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		if name, err := os.Readlink(path); err != nil || !strings.HasPrefix(name, "/memfd:") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || seen[st.Ino] {
			continue // closed meanwhile
		}
		seen[st.Ino] = true
		blocks += st.Blocks
	}
	return int(blocks * 512 >> 20), nil
}
