package virtcontainers

import (
	"context"
	"fmt"

	"github.com/husk-containers/husk/virtcontainers/placement"
)

// A Machine is a sandbox's VM as it is now.
type Machine struct {
	// VCPUs and MemoryMiB are what it has, zeros before the boot, and the others what it
	// may come to.
	VCPUs, MemoryMiB       int
	MaxVCPUs, MaxMemoryMiB int
	// CPUs and MemoryNodes of the host that it was put on, as in cpuset.cpus; empty:
	// anywhere. Pinned is set where vCPUs may have one of CPUs to themselves.
	CPUs, MemoryNodes string
	Pinned            bool
}

// Machine tells how the VM is.
func (s *Sandbox) Machine() Machine {
	size := s.guest.Size()
	m := Machine{
		VCPUs: size.VCPUs, MemoryMiB: size.MemoryMiB,
		MaxVCPUs: s.boot.Bounds.MaxVCPUs, MaxMemoryMiB: s.boot.Bounds.MaxMemoryMiB,
	}
	if p := s.capacity.Placement(); p != nil {
		m.CPUs, m.MemoryNodes, m.Pinned = placement.FormatList(p.CPUs()), placement.FormatList(p.Nodes), s.boot.Pin
	}
	return m
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
