// Package resource sizes a VM by what its containers ask for. It does no I/O.
package resource

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Limits are what a container, or all of a pod together, may use. Zero is no limit.
type Limits struct {
	// NanoCPUs are billionths of a CPU's time.
	NanoCPUs    int64
	MemoryBytes int64
}

const (
	nanoCPU = 1_000_000_000
	// defaultPeriod of a CPU quota in microseconds is the kernel's
	// (Documentation/scheduler/sched-bwc.rst in Linux).
	defaultPeriod = 100_000
	// boundless is what begins to be no limit of memory: engines say so by the largest
	// number that cgroup v1 has, 2^63 less a page.
	boundless = 1 << 60
)

// limits makes Limits of a quota and a period in microseconds, of which 0 and less is
// none, and of bytes.
func limits(quota, period, memory int64) Limits {
	var l Limits
	if period <= 0 {
		period = defaultPeriod
	}
	if quota > 0 {
		hi, lo := bits.Mul64(uint64(quota), nanoCPU)
		if hi >= uint64(period) {
			hi, lo = 0, math.MaxInt64
		} else {
			lo, _ = bits.Div64(hi, lo, uint64(period))
		}
		l.NanoCPUs = int64(max(1, min(lo, math.MaxInt64)))
	}
	if 0 < memory && memory < boundless {
		l.MemoryBytes = memory
	}
	return l
}

// OfSpec returns the limits of a container. Values of unified prevail, as they do for
// the guest's runtime; the error, InvalidArgument, is for one that makes no sense.
func OfSpec(r *specs.LinuxResources) (Limits, error) {
	if r == nil {
		return Limits{}, nil
	}
	var quota, period, memory int64
	if c := r.CPU; c != nil {
		if c.Quota != nil {
			quota = *c.Quota
		}
		if c.Period != nil {
			period = int64(min(*c.Period, math.MaxInt64))
		}
	}
	if r.Memory != nil && r.Memory.Limit != nil {
		memory = *r.Memory.Limit
	}
	if v, ok := r.Unified["cpu.max"]; ok {
		q, p, _ := strings.Cut(strings.TrimSpace(v), " ")
		var err error
		if quota, err = maximum(q); err != nil {
			return Limits{}, fmt.Errorf("linux.resources.unified (cpu.max) = %q: %w", v, err)
		}
		if p != "" {
			if period, err = strconv.ParseInt(strings.TrimSpace(p), 10, 64); err != nil {
				return Limits{}, fmt.Errorf("linux.resources.unified (cpu.max) = %q: %w: %w", v, err, errdefs.ErrInvalidArgument)
			}
		}
	}
	if v, ok := r.Unified["memory.max"]; ok {
		var err error
		if memory, err = maximum(v); err != nil {
			return Limits{}, fmt.Errorf("linux.resources.unified (memory.max) = %q: %w", v, err)
		}
	}
	return limits(quota, period, memory), nil
}

// maximum reads a number or "max", which is 0.
func maximum(s string) (int64, error) {
	s = strings.TrimSpace(s)
	if s == "max" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: want a number or max: %w", err, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// OfPod returns what CRI says of a pod's containers together: a CPU quota and its
// period in microseconds, and bytes of memory; 0 says nothing.
func OfPod(quota, period, memory int64) Limits { return limits(quota, period, memory) }
