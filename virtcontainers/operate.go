package virtcontainers

import (
	"context"
	"fmt"
)

// Size is what the VM has now; zeros before the boot.
func (s *Sandbox) Size() (vcpus, memoryMiB int) {
	size := s.guest.Size()
	return size.VCPUs, size.MemoryMiB
}

// VCPUThreads returns the host's thread ids of the vCPUs, by their numbers.
func (s *Sandbox) VCPUThreads(ctx context.Context) (map[int]int, error) {
	return s.guest.VCPUThreads(ctx)
}

// Reclaim has the guest give up what it can do without, and returns what the host held
// of its memory before and after, in MiB.
func (s *Sandbox) Reclaim(ctx context.Context) (before, after int, err error) {
	before, after, err = s.guest.Reclaim(ctx)
	if err != nil {
		return before, after, fmt.Errorf("take memory from sandbox %q: %w", s.id, err)
	}
	s.log.Info("memory reclaimed", "before_mib", before, "after_mib", after)
	return before, after, nil
}
