package spec

//lint:file-ignore SA1019 Fields that are deprecated may still be set: they are refused by name.

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Resources returns what the guest enforces of a container's resources, at its creation
// and in an update alike, and, taken out of that, the CPUs and memory nodes that it is
// bound to, which are the host's. The error is NotImplemented, or InvalidArgument, and
// names every field that cannot be honoured. r stays as it is, and may be nil.
func Resources(r *specs.LinuxResources) (guest *specs.LinuxResources, cpus, mems string, err error) {
	if r == nil {
		return nil, "", "", nil
	}
	if err := join(refuseResources(r)); err != nil {
		return nil, "", "", err
	}
	out := specs.LinuxResources{Devices: r.Devices, Memory: r.Memory, Pids: r.Pids, HugepageLimits: r.HugepageLimits}
	if c := r.CPU; c != nil {
		cpus, mems = c.Cpus, c.Mems
		own := *c
		own.Cpus, own.Mems = "", ""
		if own != (specs.LinuxCPU{}) {
			out.CPU = &own
		}
	}
	out.Unified = maps.Clone(r.Unified)
	for _, f := range []struct {
		key string
		to  *string
	}{{"cpuset.cpus", &cpus}, {"cpuset.mems", &mems}} {
		if v, ok := r.Unified[f.key]; ok {
			*f.to = strings.TrimSpace(v)
			delete(out.Unified, f.key)
		}
	}
	if len(out.Unified) == 0 {
		out.Unified = nil
	}
	return &out, cpus, mems, nil
}

// guestKeys are the files of a container's cgroup that say what it may use. The
// others are of devices and CPUs of the host, tell, or do something.
var guestKeys = regexp.MustCompile(`^(` + strings.Join([]string{
	`cpu\.(idle|max|max\.burst|weight|weight\.nice)`,
	`memory\.(min|low|high|max|oom\.group|swap\.high|swap\.max|zswap\.max)`,
	`pids\.max`,
	`hugetlb\.[0-9]+[KMG]B\.(max|rsvd\.max)`,
	`cgroup\.max\.(depth|descendants)`,
	`cpuset\.(cpus|mems)`,
}, "|") + `)$`)

// pageSize is one as the kernel's files have it.
var pageSize = regexp.MustCompile(`^[0-9]+[KMG]B$`)

func refuseResources(r *specs.LinuxResources) []error {
	var errs []error
	no := func(present bool, field, what string) {
		if present {
			errs = append(errs, unsupported("linux.resources."+field, what))
		}
	}
	wrong := func(present bool, field, why string) {
		if present {
			errs = append(errs, fmt.Errorf("linux.resources.%s: %s: %w", field, why, errdefs.ErrInvalidArgument))
		}
	}
	if m := r.Memory; m != nil {
		no(m.Kernel != nil, "memory.kernel", "a limit of cgroup v1")
		no(m.KernelTCP != nil, "memory.kernelTCP", "a limit of cgroup v1")
		no(m.Swappiness != nil, "memory.swappiness", "a setting of cgroup v1")
		no(m.DisableOOMKiller != nil && *m.DisableOOMKiller, "memory.disableOOMKiller", "a setting of cgroup v1")
		no(m.UseHierarchy != nil && !*m.UseHierarchy, "memory.useHierarchy", "accounting without the hierarchy, a setting of cgroup v1,")
		wrong(m.Reservation != nil && *m.Reservation < 0, "memory.reservation", "less than 0")
		for _, f := range []struct {
			name  string
			value *int64
		}{{"memory.limit", m.Limit}, {"memory.swap", m.Swap}} {
			wrong(f.value != nil && *f.value < -1, f.name, "less than -1, which is no limit")
		}
	}
	if c := r.CPU; c != nil {
		no(c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0, "cpu.realtimeRuntime", "a setting of cgroup v1")
		no(c.RealtimePeriod != nil && *c.RealtimePeriod != 0, "cpu.realtimePeriod", "a setting of cgroup v1")
	}
	if b := r.BlockIO; b != nil {
		what := "a limit on the host's block devices"
		no(b.Weight != nil && *b.Weight != 0, "blockIO.weight", "a share of the host's block devices")
		no(b.LeafWeight != nil && *b.LeafWeight != 0, "blockIO.leafWeight", "a setting of cgroup v1")
		no(len(b.WeightDevice) > 0, "blockIO.weightDevice", "a share of the host's block devices")
		no(len(b.ThrottleReadBpsDevice) > 0, "blockIO.throttleReadBpsDevice", what)
		no(len(b.ThrottleWriteBpsDevice) > 0, "blockIO.throttleWriteBpsDevice", what)
		no(len(b.ThrottleReadIOPSDevice) > 0, "blockIO.throttleReadIOPSDevice", what)
		no(len(b.ThrottleWriteIOPSDevice) > 0, "blockIO.throttleWriteIOPSDevice", what)
	}
	if n := r.Network; n != nil {
		no(n.ClassID != nil && *n.ClassID != 0, "network.classID", "a setting of cgroup v1")
		no(len(n.Priorities) > 0, "network.priorities", "a setting of cgroup v1")
	}
	no(len(r.Rdma) > 0, "rdma", "a limit on the host's RDMA devices")
	for i, h := range r.HugepageLimits {
		wrong(!pageSize.MatchString(h.Pagesize), fmt.Sprintf("hugepageLimits[%d].pageSize", i), fmt.Sprintf("%q is no size such as 2MB", h.Pagesize))
	}
	for i, d := range r.Devices {
		no(d.Allow && hostDevice(d), fmt.Sprintf("devices[%d]", i), fmt.Sprintf("the host's device %s %s:%s", d.Type, number(d.Major), number(d.Minor)))
	}
	for _, key := range slices.Sorted(maps.Keys(r.Unified)) {
		no(!guestKeys.MatchString(key), fmt.Sprintf("unified (%s)", key), "what is no limit of cpu, memory, pids or hugetlb")
	}
	return errs
}

// hostDevice tells of a rule whose number is not the same in every Linux kernel.
func hostDevice(d specs.LinuxDeviceCgroup) bool {
	switch {
	case d.Major == nil || *d.Major < 0: // any
		return false
	case d.Type != "c" && d.Type != "u":
		return true
	case 136 <= *d.Major && *d.Major <= 143: // terminals
		return false
	case d.Minor == nil || *d.Minor < 0:
		return !StaticChar(*d.Major, 0)
	}
	return !StaticChar(*d.Major, *d.Minor)
}

func number(n *int64) string {
	if n == nil || *n < 0 {
		return "*"
	}
	return strconv.FormatInt(*n, 10)
}
