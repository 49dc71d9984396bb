package resource

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// A Size is how large a VM is.
type Size struct {
	VCPUs     int
	MemoryMiB int
}

// Bounds are what is configured for every VM, in the units of its keys.
type Bounds struct {
	DefaultVCPUs, DefaultMemoryMiB int
	// MaxVCPUs and MaxMemoryMiB are at least 1: where nothing is configured, the host's.
	MaxVCPUs, MaxMemoryMiB int
	// HostVCPUs and HostMemoryMiB are what the host has, where nothing is configured: a
	// limit above means all of it, as it does for a container without a VM. 0: no such
	// limit is let in.
	HostVCPUs, HostMemoryMiB int
	// PossibleVCPUs may be in a VM later, if more than at its boot: the guest's kernel
	// keeps memory for each.
	PossibleVCPUs int
}

// Boot returns the size of a VM that boots for a pod, or a lone container, with those
// limits. Of what has no limit it is the default; a default above the maximum, which
// is the host's then, comes down to it.
//
//	vCPUs    the limit, rounded up to whole ones
//	memory   the limit, and what the guest's system takes beside it
//
// The error is InvalidArgument for a limit with which no container starts, and
// FailedPrecondition for more than the maximum.
func (b Bounds) Boot(l Limits) (Size, error) {
	if err := l.check(); err != nil {
		return Size{}, err
	}
	s := Size{min(b.DefaultVCPUs, b.MaxVCPUs), min(b.DefaultMemoryMiB, b.MaxMemoryMiB)}
	if l.NanoCPUs > 0 {
		s.VCPUs = b.vcpus(l)
	}
	if l.MemoryBytes > 0 {
		s.MemoryMiB = b.memory(l, s.VCPUs)
	}
	return s, b.check(s, l)
}

// Grown returns the size that a VM which booted with boot should have now for the
// containers that run, by id: of each dimension the sum of their limits, sized as by
// Boot, and at least the default where one of them has no limit; never less than boot,
// in which the pod's announced limits are. A container counts from its creation
// until its exit: one that has exited, such as an init container, uses nothing.
//
// The errors are those of Boot, with the containers' ids.
func (b Bounds) Grown(boot Size, containers map[string]Limits) (Size, error) {
	var sum Limits
	open := Limits{1, 1} // a 1 is for: each container has a limit
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(containers)) {
		l := containers[id]
		if err := l.check(); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", id, err))
		}
		sum.NanoCPUs = add(sum.NanoCPUs, l.NanoCPUs)
		sum.MemoryBytes = add(sum.MemoryBytes, l.MemoryBytes)
		open.NanoCPUs = min(open.NanoCPUs, l.NanoCPUs)
		open.MemoryBytes = min(open.MemoryBytes, l.MemoryBytes)
	}
	if len(errs) > 0 {
		return Size{}, errors.Join(errs...)
	}
	s := boot
	if open.NanoCPUs == 0 {
		s.VCPUs = max(s.VCPUs, min(b.DefaultVCPUs, b.MaxVCPUs))
	}
	if open.MemoryBytes == 0 {
		s.MemoryMiB = max(s.MemoryMiB, min(b.DefaultMemoryMiB, b.MaxMemoryMiB))
	}
	if sum.NanoCPUs > 0 {
		s.VCPUs = max(s.VCPUs, b.vcpus(sum))
	}
	if sum.MemoryBytes > 0 {
		s.MemoryMiB = max(s.MemoryMiB, b.memory(sum, s.VCPUs))
	}
	if err := b.check(s, sum); err != nil {
		return Size{}, fmt.Errorf("the limits of containers %s together: %w", strings.Join(slices.Sorted(maps.Keys(containers)), ", "), err)
	}
	return s, nil
}

// MinMemoryBytes is the least memory limit of a container.
const MinMemoryBytes = minMemoryMiB << 20

// check tells of a limit with which nothing starts.
func (l Limits) check() error {
	if 0 < l.MemoryBytes && l.MemoryBytes < MinMemoryBytes {
		return fmt.Errorf("a memory limit of %d bytes: no container starts with less than %d MiB; raise the limit: %w",
			l.MemoryBytes, minMemoryMiB, errdefs.ErrInvalidArgument)
	}
	return nil
}

// check tells of what is above the maximum. All that is too much is named.
func (b Bounds) check(s Size, l Limits) error {
	var over []string
	if s.VCPUs > b.MaxVCPUs {
		over = append(over, fmt.Sprintf("a CPU limit of %.6g needs %d vCPUs, and at most %d are allowed: lower it, or raise hypervisor.max_vcpus of the node's configuration",
			float64(l.NanoCPUs)/nanoCPU, s.VCPUs, b.MaxVCPUs))
	}
	if s.MemoryMiB > b.MaxMemoryMiB {
		over = append(over, fmt.Sprintf("a memory limit of %d MiB needs a VM of %d MiB, and at most %d are allowed: lower it, or raise hypervisor.max_memory_mib of the node's configuration",
			ceilDiv(l.MemoryBytes, 1<<20), s.MemoryMiB, b.MaxMemoryMiB))
	}
	if len(over) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w", strings.Join(over, "; "), errdefs.ErrFailedPrecondition)
}

// vcpus are what a CPU limit comes to.
func (b Bounds) vcpus(l Limits) int {
	n := int(ceilDiv(l.NanoCPUs, nanoCPU))
	if b.HostVCPUs > 0 {
		n = min(n, b.HostVCPUs)
	}
	return n
}

// memory is what a memory limit comes to, in MiB.
func (b Bounds) memory(l Limits, vcpus int) int {
	n := memoryFor(l.MemoryBytes, vcpus, max(vcpus, b.PossibleVCPUs))
	if b.HostMemoryMiB > 0 {
		n = min(n, b.HostMemoryMiB)
	}
	return n
}

func ceilDiv(a, b int64) int64 { return a/b + min(1, a%b) }

// add is a sum that stays at the largest number there is.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
