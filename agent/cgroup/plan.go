package cgroup

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A write is one value for one control file.
type write struct {
	field string // of the OCI resources
	file  string
	value string
	// optional: a kernel may be without the file, and another has the limit too.
	optional bool
}

// A plan is what a cgroup of version 2 is told of OCI resources, in the order in which
// it is written. It does no I/O.
type plan struct {
	current func(file string) string // empty: there is none
	writes  []write
	refused []string
	err     error
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// newPlan makes the plan for r, but for its devices. current reads what the cgroup has now:
// where one file of version 2 has what the OCI says in two fields, what is not said
// stays. As in runc, a number that is 0 is not said, and one that is negative is no
// limit.
func newPlan(r *specs.LinuxResources, current func(file string) string) ([]write, error) {
	p := &plan{current: current}
	if r.Pids != nil && r.Pids.Limit != nil {
		p.limit("pids.limit", "pids.max", *r.Pids.Limit)
	}
	if r.CPU != nil {
		p.cpu(r.CPU)
	}
	if r.BlockIO != nil {
		p.blockIO(r.BlockIO)
	}
	for _, h := range r.HugepageLimits {
		value := strconv.FormatUint(h.Limit, 10)
		p.add("hugepageLimits", "hugetlb."+h.Pagesize+".max", value)
		p.writes = append(p.writes, write{"hugepageLimits", "hugetlb." + h.Pagesize + ".rsvd.max", value, true})
	}
	if r.Network != nil && r.Network.ClassID != nil && *r.Network.ClassID != 0 {
		p.refuse("network.classID")
	}
	if r.Network != nil && len(r.Network.Priorities) > 0 {
		p.refuse("network.priorities")
	}
	if len(r.Rdma) > 0 {
		p.refuse("rdma")
	}
	p.unified(r.Unified)
	if r.Memory != nil {
		p.memory(r.Memory)
	}
	if len(p.refused) > 0 {
		return nil, invalid("resources: %s: the guest, whose cgroups are of version 2, has no such limit: leave it out", strings.Join(p.refused, ", "))
	}
	if p.err == nil {
		p.order()
	}
	return p.writes, p.err
}

func (p *plan) add(field, file, value string) {
	p.writes = append(p.writes, write{field: field, file: file, value: value})
}

func (p *plan) refuse(field string) { p.refused = append(p.refused, field) }

func (p *plan) fail(format string, args ...any) {
	if p.err == nil {
		p.err = invalid("resources: "+format, args...)
	}
}

// limit adds a limit of which 0 says nothing, and less than that that there is none.
func (p *plan) limit(field, file string, n int64) {
	if n != 0 {
		p.add(field, file, limitText(n))
	}
}

func limitText(n int64) string {
	if n < 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

func (p *plan) cpu(c *specs.LinuxCPU) {
	if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 {
		p.refuse("cpu.realtimeRuntime")
	}
	if c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
		p.refuse("cpu.realtimePeriod")
	}
	if c.Idle != nil {
		if *c.Idle != 0 && *c.Idle != 1 {
			p.fail("cpu.idle is %d, want 0 or 1", *c.Idle)
		}
		p.add("cpu.idle", "cpu.idle", strconv.FormatInt(*c.Idle, 10))
	}
	if c.Shares != nil && *c.Shares != 0 {
		p.add("cpu.shares", "cpu.weight", strconv.FormatUint(weight(*c.Shares), 10))
	}
	p.quota(c)
	switch c.Cpus {
	case "":
	case agentv1.AllCPUs:
		p.add("cpu.cpus", "cpuset.cpus", "\n") // an empty list is what it is in
	default:
		p.add("cpu.cpus", "cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		p.add("cpu.mems", "cpuset.mems", c.Mems)
	}
}

// weight is the cpu.weight of version 2 (1 to 10000) for the shares of version 1 (2 to
// 262144), by the formula of runc and crun.
func weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// quota and burst: the kernel refuses a burst above the quota at every moment.
func (p *plan) quota(c *specs.LinuxCPU) {
	quota, period := int64(0), uint64(0)
	if c.Quota != nil {
		quota = *c.Quota
	}
	if c.Period != nil {
		period = *c.Period
	}
	if c.Burst != nil {
		p.add("cpu.burst", "cpu.max.burst", "0")
	}
	if quota != 0 || period != 0 {
		nowQuota, nowPeriod, _ := strings.Cut(p.current("cpu.max"), " ")
		if quota != 0 {
			nowQuota = limitText(quota)
		}
		if period != 0 {
			nowPeriod = strconv.FormatUint(period, 10)
		}
		p.add("cpu.quota and cpu.period", "cpu.max", strings.TrimSpace(nowQuota+" "+nowPeriod))
	}
	if c.Burst != nil && *c.Burst != 0 {
		p.add("cpu.burst", "cpu.max.burst", strconv.FormatUint(*c.Burst, 10))
	}
}

func (p *plan) memory(m *specs.LinuxMemory) {
	//lint:ignore SA1019 it is read to be refused
	if m.Kernel != nil && *m.Kernel > 0 {
		p.refuse("memory.kernel")
	}
	if m.KernelTCP != nil && *m.KernelTCP > 0 {
		p.refuse("memory.kernelTCP")
	}
	if m.Swappiness != nil {
		p.refuse("memory.swappiness")
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		p.refuse("memory.disableOOMKiller")
	}
	if m.Reservation != nil {
		p.limit("memory.reservation", "memory.low", *m.Reservation)
	}
	limit := p.current("memory.max")
	if m.Limit != nil && *m.Limit != 0 {
		limit = limitText(*m.Limit)
		p.add("memory.limit", "memory.max", limit)
	}
	if m.Swap != nil && *m.Swap != 0 {
		p.swap(*m.Swap, limit)
	}
}

// swap of version 1 is memory and swap together, that of version 2 is swap alone.
func (p *plan) swap(total int64, limit string) {
	if total < 0 {
		p.add("memory.swap", "memory.swap.max", "max")
		return
	}
	n, err := strconv.ParseInt(limit, 10, 64)
	switch {
	case err != nil:
		p.fail("memory.swap is %d, memory and swap together, and memory.limit is not set", total)
	case total < n:
		p.fail("memory.swap, memory and swap together, is %d, less than memory.limit, %d", total, n)
	default:
		p.add("memory.swap", "memory.swap.max", strconv.FormatInt(total-n, 10))
	}
}

func (p *plan) blockIO(b *specs.LinuxBlockIO) {
	// The guest's disks have no scheduler that knows weights.
	if b.Weight != nil && *b.Weight != 0 {
		p.refuse("blockIO.weight")
	}
	if b.LeafWeight != nil && *b.LeafWeight != 0 {
		p.refuse("blockIO.leafWeight")
	}
	if len(b.WeightDevice) > 0 {
		p.refuse("blockIO.weightDevice")
	}
	for _, kind := range []struct {
		field, key string
		devices    []specs.LinuxThrottleDevice
	}{
		{"blockIO.throttleReadBpsDevice", "rbps", b.ThrottleReadBpsDevice},
		{"blockIO.throttleWriteBpsDevice", "wbps", b.ThrottleWriteBpsDevice},
		{"blockIO.throttleReadIOPSDevice", "riops", b.ThrottleReadIOPSDevice},
		{"blockIO.throttleWriteIOPSDevice", "wiops", b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range kind.devices {
			rate := "max"
			if d.Rate != 0 {
				rate = strconv.FormatUint(d.Rate, 10)
			}
			p.add(kind.field, "io.max", fmt.Sprintf("%d:%d %s=%s", d.Major, d.Minor, kind.key, rate))
		}
	}
}

// unifiable are the files that hold a limit: no others are written for a container.
// Those of pressure are none: what is written to them holds for the writer.
var unifiable = regexp.MustCompile(`^(cpu|cpuset|hugetlb|io|memory|misc|pids|rdma)\.[A-Za-z0-9_.]+$`)

func (p *plan) unified(files map[string]string) {
	for _, file := range slices.Sorted(maps.Keys(files)) {
		field := fmt.Sprintf("unified[%q]", file)
		switch {
		case !unifiable.MatchString(file), strings.HasSuffix(file, ".pressure"), file == "memory.reclaim":
			p.refuse(field)
			continue
		}
		for line := range strings.Lines(files[file]) {
			p.add(field, file, strings.TrimSpace(line))
		}
	}
}

// order puts last what is hard to undo: the kernel forgets the weight of a cgroup that
// becomes idle, and where a limit of memory is lowered again processes may die of it.
func (p *plan) order() {
	last := func(w write) int {
		switch {
		case w.file == "memory.max":
			return 1
		case w.file == "cpu.idle" && w.value == "1":
			return 2
		}
		return 0
	}
	slices.SortStableFunc(p.writes, func(a, b write) int { return last(a) - last(b) })
	seen := make(map[string]string)
	for _, w := range p.writes {
		if other := seen[w.file]; other != "" && other != w.field {
			if w.file != "io.max" || strings.HasPrefix(w.field, "unified") {
				p.fail("%s and %s both set %s: leave one out", other, w.field, w.file)
			}
		}
		seen[w.file] = w.field
	}
}
