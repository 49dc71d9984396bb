package hypervisor

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// What follows are abilities that a VM may have, by type assertion.

// A Pauser is a VM that can stand still: its vCPUs execute nothing, and its memory
// stays.
type Pauser interface {
	// Pause and Resume are idempotent. Connections to the guest stay open.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
}

// A Size is how large a VM is.
type Size struct {
	VCPUs     int
	MemoryMiB int
}

// Check tells whether a VM with room for most can be as large as s. The error, an
// errdefs.ErrInvalidArgument, says in one line all that is too much.
func (s Size) Check(most Size) error {
	var wrong []string
	if s.VCPUs > most.VCPUs {
		wrong = append(wrong, fmt.Sprintf("%d vCPUs, and it has room for %d", s.VCPUs, most.VCPUs))
	}
	if s.MemoryMiB > most.MemoryMiB {
		wrong = append(wrong, fmt.Sprintf("%d MiB of memory, and it has room for %d", s.MemoryMiB, most.MemoryMiB))
	}
	if wrong != nil {
		return fmt.Errorf("%s: %w", strings.Join(wrong, "; "), errdefs.ErrInvalidArgument)
	}
	return nil
}

// A Resizer is a VM that can grow up to its Config's MaxVCPUs and MaxMemoryMiB and
// shrink to what it was booted with. Calls are served in turn.
type Resizer interface {
	// Size is what the VM has now.
	Size() Size
	// Resize brings the VM as near to want as it comes, and returns what it has then,
	// also with an error, which says what is missing and why. Memory is rounded up to
	// what the monitor deals in, a few MiB; less than what the VM was booted with means
	// that. More than the maximum is InvalidArgument and changes nothing.
	// The guest has to take vCPUs that were plugged into use, and should have taken
	// them out of use before they are unplugged. Memory it takes by itself, and gives
	// back what it can: where it comes no further for a while, or ctx ends, the VM
	// stays with what it has.
	Resize(ctx context.Context, want Size) (Size, error)
}

// A Placer is a VM whose threads the host can tell apart.
type Placer interface {
	// VCPUThreads returns the thread ids of the vCPUs, as the caller's pid namespace
	// has them, by their number in the guest; a vCPU that is not plugged has none.
	VCPUThreads(ctx context.Context) (map[int]int, error)
}

// A Balloon is a VM whose guest can be asked to give memory back.
type Balloon interface {
	// SetMemory asks the guest to make do with so much of what Size says, and returns
	// what it has come to, in MiB, when it is there, has come no further for a while,
	// or ctx ends. A guest in want of memory takes it back by itself; all that the VM
	// has lets it have all again. Less than the monitor leaves a guest is
	// InvalidArgument and changes nothing.
	SetMemory(ctx context.Context, mib int) (int, error)
}
