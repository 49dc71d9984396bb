package hypervisor

import "context"

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

// A Resizer is a VM that can grow up to its Config's MaxVCPUs and MaxMemoryMiB and
// shrink to what it was booted with. Calls are served in turn.
type Resizer interface {
	// Size is what the VM has now.
	Size() Size
	// Resize brings the VM as near to want as it comes, and returns what it has then.
	// The guest has to take what was plugged into use, and must have taken vCPUs out
	// of use before they are unplugged; of memory it gives back what it can until ctx
	// ends. An error says what is missing and why; more than the maximum is
	// InvalidArgument and changes nothing.
	Resize(ctx context.Context, want Size) (Size, error)
}

// A Placer is a VM whose threads the host can tell apart.
type Placer interface {
	// VCPUThreads returns the host's thread ids of the vCPUs, by their number in the
	// guest; a vCPU that is not plugged has none.
	VCPUThreads(ctx context.Context) (map[int]int, error)
}

// A Balloon is a VM whose guest can be asked to give memory back.
type Balloon interface {
	// SetMemory asks the guest to make do with so much, and returns what it has come
	// to, in MiB, when it is there, has come no further for a while, or ctx ends.
	// All that the VM has lets the guest have it again.
	SetMemory(ctx context.Context, mib int) (int, error)
}
