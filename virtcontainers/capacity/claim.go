package capacity

import (
	"maps"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// A Claim is what a container asks for.
type Claim struct {
	// Resources has of CPU the quota and its period, of memory the limit, and of
	// unified what stands for these. The rest is of no matter here.
	Resources *specs.LinuxResources
	// CPUs and Mems are those of the host that the container is confined to, as in
	// cpuset.cpus; empty: any.
	CPUs, Mems string
}

// Merged returns what holds after an update: of what the update is silent about, the
// old.
func (c Claim) Merged(update Claim) Claim {
	merged := specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}, Unified: map[string]string{}}
	for _, from := range []*specs.LinuxResources{c.Resources, update.Resources} {
		if from == nil {
			continue
		}
		if from.CPU != nil && from.CPU.Quota != nil {
			merged.CPU.Quota = from.CPU.Quota
			delete(merged.Unified, "cpu.max")
		}
		if from.CPU != nil && from.CPU.Period != nil {
			merged.CPU.Period = from.CPU.Period
		}
		if from.Memory != nil && from.Memory.Limit != nil {
			merged.Memory.Limit = from.Memory.Limit
			delete(merged.Unified, "memory.max")
		}
		maps.Copy(merged.Unified, from.Unified)
	}
	c.Resources = &merged
	if update.CPUs != "" {
		c.CPUs = update.CPUs
	}
	if update.Mems != "" {
		c.Mems = update.Mems
	}
	return c
}
