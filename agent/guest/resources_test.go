package guest

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// TestResources is one test for the guest's sake.
func TestResources(t *testing.T) {
	g := boot(t, nil)
	for _, test := range []struct {
		name string
		run  func(*guest)
	}{
		{"limits", testLimits},
		{"updates", testUpdates},
		{"refusals", testRefusals},
		{"statistics", testStatistics},
		{"pause", testPause},
		{"CPUs", testCPUs},
	} {
		t.Run(test.name, func(t *testing.T) {
			one := *g
			one.T = t
			test.run(&one)
		})
	}
}

// limits has resources and what the files of the cgroup say then. The fields that are
// refused are in the table of agent/cgroup.
var limits = []struct{ resources, file, want string }{
	{`{"memory":{"limit":67108864}}`, "memory.max", "67108864"},
	{`{"memory":{"limit":67108864,"swap":100663296}}`, "memory.swap.max", "33554432"},
	{`{"memory":{"reservation":8388608}}`, "memory.low", "8388608"},
	{`{"cpu":{"shares":1024}}`, "cpu.weight", "39"},
	{`{"cpu":{"quota":50000,"period":200000}}`, "cpu.max", "50000 200000"},
	{`{"cpu":{"quota":50000,"period":100000}}`, "cpu.max", "50000 100000"},
	{`{"cpu":{"quota":50000,"burst":20000}}`, "cpu.max.burst", "20000"},
	{`{"cpu":{"shares":512,"idle":1}}`, "cpu.idle", "1"},
	{`{"cpu":{"cpus":"1"}}`, "cpuset.cpus.effective", "1"},
	{`{"cpu":{"mems":"0"}}`, "cpuset.mems", "0"},
	{`{"pids":{"limit":77}}`, "pids.max", "77"},
	{`{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}`, "hugetlb.2MB.max", "4194304"},
	{`{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}`, "hugetlb.2MB.rsvd.max", "4194304"},
	{`{"unified":{"memory.high":"62914560","cgroup.max.depth":"5"}}`, "", `unified["cgroup.max.depth"]`},
	{`{"unified":{"memory.high":"62914560"}}`, "memory.high", "62914560"},
	{`{"unified":{"memory.oom.group":"1"}}`, "memory.oom.group", "1"},
}

func resources(t testing.TB, s string) *specs.LinuxResources {
	t.Helper()
	r := &specs.LinuxResources{}
	if err := json.Unmarshal([]byte(s), r); err != nil {
		t.Fatal(err)
	}
	return r
}

// testLimits: at create and by an update.
func testLimits(g *guest) {
	for i, tc := range limits {
		id := fmt.Sprint("limits", i)
		o := g.output()
		err := g.create(id, "sleep 1000", resources(g, tc.resources), o)
		if tc.file == "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
				g.Errorf("%s: %v", tc.resources, err)
			}
			continue
		}
		if err != nil {
			g.Errorf("%s: %v", tc.resources, err)
			continue
		}
		if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
			g.Fatal(err)
		}
		if got := g.file(id, tc.file); got != tc.want {
			g.Errorf("created with %s: %s is %q", tc.resources, tc.file, got)
		}
		if err := g.remove(id); err != nil {
			g.Error(err)
		}
	}
	g.run("updated", "sleep 1000", nil)
	for _, tc := range limits {
		if tc.file == "" || strings.Contains(tc.resources, "idle") { // which leaves no shares to the rest
			continue
		}
		if err := g.update("updated", tc.resources); err != nil {
			g.Errorf("%s: %v", tc.resources, err)
		}
		if got := g.file("updated", tc.file); got != tc.want {
			g.Errorf("updated with %s: %s is %q", tc.resources, tc.file, got)
		}
	}
	if err := g.remove("updated"); err != nil {
		g.Error(err)
	}
}

// all is every limit that a container has.
func (g *guest) all(id string) string {
	g.Helper()
	return g.file(id, "memory.max /sys/fs/cgroup/memory.low /sys/fs/cgroup/memory.swap.max /sys/fs/cgroup/cpu.weight /sys/fs/cgroup/cpu.max "+
		"/sys/fs/cgroup/cpu.max.burst /sys/fs/cgroup/cpu.idle /sys/fs/cgroup/cpuset.cpus /sys/fs/cgroup/pids.max /sys/fs/cgroup/io.max /sys/fs/cgroup/memory.high")
}

func testUpdates(g *guest) {
	g.run("c", "sleep 1000", resources(g, `{"memory":{"limit":67108864},"cpu":{"quota":50000,"period":100000},"pids":{"limit":50}}`))
	for _, tc := range []struct{ resources, file, want string }{
		{`{"cpu":{"period":50000}}`, "cpu.max", "50000 50000"},
		{`{"cpu":{"quota":-1}}`, "cpu.max", "max 50000"},
		{`{"memory":{"swap":100663296}}`, "memory.swap.max", "33554432"},
		{`{"memory":{"limit":-1}}`, "memory.max", "max"},
		{`{"pids":{"limit":-1}}`, "pids.max", "max"},
		{`{}`, "pids.max", "max"},
	} {
		if err := g.update("c", tc.resources); err != nil {
			g.Error(err)
		}
		if got := g.file("c", tc.file); got != tc.want {
			g.Errorf("%s: %s is %q, want %q", tc.resources, tc.file, got, tc.want)
		}
	}
	if err := g.remove("c"); err != nil {
		g.Error(err)
	}
}

// testRefusals: nothing is changed.
func testRefusals(g *guest) {
	// It holds 24 MiB that cannot be reclaimed.
	o := g.run("c", "head -c 25165824 /dev/zero > /tmp/f; echo done; sleep 1000", resources(g, `{"memory":{"limit":67108864},"cpu":{"shares":200,"quota":50000,"cpus":"0"}}`))
	g.await(o, "done")
	before := g.all("c")
	for name, tc := range map[string]struct {
		resources string
		class     func(error) bool
		text      string
	}{
		"less memory than in use": {`{"pids":{"limit":9},"memory":{"limit":8388608}}`, errdefs.IsFailedPrecondition, "8388608 bytes, and the container uses"},
		"a quota too small":       {`{"pids":{"limit":9},"cpu":{"shares":300,"quota":1,"cpus":"0-1"},"memory":{"limit":50331648}}`, errdefs.IsInvalidArgument, "cpu.quota"},
		"a burst too large":       {`{"pids":{"limit":9},"cpu":{"quota":20000,"burst":30000}}`, errdefs.IsInvalidArgument, "cpu.burst"},
		"no such CPU":             {`{"pids":{"limit":9},"cpu":{"cpus":"0-2"}}`, errdefs.IsInvalidArgument, `"0-2", and the guest has "0-1"`},
		"no such disk":            {`{"pids":{"limit":9},"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":5}]}}`, errdefs.IsInvalidArgument, "throttleReadBpsDevice"},
		"no such page":            {`{"pids":{"limit":9},"hugepageLimits":[{"pageSize":"3MB","limit":0}]}`, errdefs.IsInvalidArgument, "hugetlb.3MB.max"},
		"a file that is none":     {`{"pids":{"limit":9},"unified":{"memory.maximum":"1"}}`, errdefs.IsInvalidArgument, "memory.maximum"},
		"a value that is none":    {`{"pids":{"limit":9},"unified":{"memory.high":"much"}}`, errdefs.IsInvalidArgument, "much"},
		"devices":                 {`{"pids":{"limit":9},"devices":[{"allow":true,"access":"rwm"}]}`, errdefs.IsInvalidArgument, "devices"},
		"version 1":               {`{"pids":{"limit":9},"memory":{"swappiness":5}}`, errdefs.IsInvalidArgument, "memory.swappiness"},
		"a field of no version":   {`{"pids":{"limit":9},"memory":{"limits":5}}`, errdefs.IsInvalidArgument, "limits"},
	} {
		if err := g.update("c", tc.resources); !tc.class(err) || !strings.Contains(err.Error(), tc.text) {
			g.Errorf("%s: %v, want %q", name, err, tc.text)
		} else {
			g.Log(err)
		}
		if after := g.all("c"); after != before {
			g.Errorf("%s: the limits were\n%s\nand are\n%s", name, before, after)
		}
	}
	// The cache of files makes way.
	if s := g.stats("c"); s.GetMemory().GetUsage() < 24<<20 || s.GetMemory().GetShmem() < 24<<20 {
		g.Errorf("memory %v", s.GetMemory())
	}
	if err := g.remove("c"); err != nil {
		g.Error(err)
	}
}

func testStatistics(g *guest) {
	g.run("user", "while :; do :; done", resources(g, `{"cpu":{"quota":50000},"pids":{"limit":9},"memory":{"limit":67108864}}`))
	o := g.run("system", "cat /dev/zero > /dev/null & head -c 8388608 /dev/zero > /tmp/f; echo done; wait", nil)
	g.await(o, "done")
	begin := time.Now()
	user0, system0 := g.stats("user").GetCpu(), g.stats("system").GetCpu() // their start is behind them
	for g.stats("user").GetCpu().GetUsageUsec() < user0.GetUsageUsec()+1e6 || g.stats("system").GetCpu().GetUsageUsec() < system0.GetUsageUsec()+1e6 {
		if time.Since(begin) > time.Minute {
			g.Fatal("too little work is told of")
		}
	}
	user, system, all := g.stats("user"), g.stats("system"), g.stats("")
	if c := user.GetCpu(); c.GetUserUsec()-user0.GetUserUsec() < c.GetSystemUsec()-user0.GetSystemUsec() || c.GetUsageUsec() < c.GetUserUsec() || c.GetThrottledUsec() == 0 || c.GetPressure() == nil {
		g.Errorf("a loop: %v", c)
	}
	if c := system.GetCpu(); c.GetSystemUsec()-system0.GetSystemUsec() < c.GetUserUsec()-system0.GetUserUsec() {
		g.Errorf("a copy: %v", c)
	}
	if m := user.GetMemory(); m.GetUsage() == 0 || m.GetUsageLimit() != 64<<20 || m.GetMaxUsage() < m.GetUsage() || m.GetAnon() == 0 || m.GetPgfault() == 0 {
		g.Errorf("memory %v", m)
	}
	if m := system.GetMemory(); m.GetUsage() < 8<<20 || m.GetShmem() < 8<<20 || m.GetUsageLimit() != math.MaxUint64 {
		g.Errorf("memory %v", m)
	}
	if p := user.GetPids(); p.GetCurrent() != 1 || p.GetLimit() != 9 {
		g.Errorf("pids %v", p)
	}
	if n := all.GetPids().GetCurrent(); n != 3 && n != 4 { // busybox runs cat in its own process, or not
		g.Errorf("pids of all %d", n)
	}
	if sum := user.GetCpu().GetUsageUsec() + system.GetCpu().GetUsageUsec(); all.GetCpu().GetUsageUsec() < sum {
		g.Errorf("all together %d us, less than %d", all.GetCpu().GetUsageUsec(), sum)
	}
	if h := user.GetHugetlb(); len(h) == 0 || !slices.ContainsFunc(h, func(h *agentv1.HugetlbStats) bool { return h.GetPageSize() == "2MB" }) {
		g.Errorf("hugetlb %v", h)
	}
	for _, id := range []string{"user", "system"} {
		if err := g.signal(id, 9); err != nil {
			g.Error(err)
		}
		g.wait(id)
	}
	if s := g.stats("user"); s.GetPids().GetCurrent() != 0 || s.GetCpu().GetUsageUsec() < user.GetCpu().GetUsageUsec() {
		g.Errorf("after the end: %v", s)
	}
	for _, id := range []string{"user", "system"} {
		if err := g.remove(id); err != nil {
			g.Error(err)
		}
	}
	g.run("idle", "sleep 1000", nil)
	g.stats("idle")
	var each []time.Duration
	var empty []time.Duration
	for range 31 {
		begin := time.Now()
		g.stats("idle")
		each = append(each, time.Since(begin))
		begin = time.Now()
		if _, err := g.Hello(g.ctx, &agentv1.HelloRequest{}); err != nil {
			g.Fatal(err)
		}
		empty = append(empty, time.Since(begin))
	}
	slices.Sort(each)
	slices.Sort(empty)
	g.Logf("StatsContainer: median %s, worst of 31 %s; Hello, a call that does nothing: median %s", each[15], each[30], empty[15])
	if err := g.remove("idle"); err != nil {
		g.Error(err)
	}
}

// await waits until the output has a line.
func (g *guest) await(o *output, line string) {
	g.Helper()
	for {
		o.mu.Lock()
		ok := slices.Contains(strings.Split(o.text.String(), "\n"), line)
		text := o.text.String()
		o.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-g.ctx.Done():
			g.Fatalf("no line %q: %q", line, text)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func testPause(g *guest) {
	pause := func(id string) error {
		_, err := g.PauseContainer(g.ctx, &agentv1.PauseContainerRequest{ContainerId: id})
		return errgrpc.ToNative(err)
	}
	g.run("c", "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); done", nil)
	g.run("sibling", "sleep 1000", nil)
	if err := pause("c"); err != nil {
		g.Fatal(err)
	}
	before := g.stats("c").GetCpu().GetUsageUsec()
	if _, err := g.exec("c", "e", "true"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the container is paused: resume it first") {
		g.Errorf("exec: %v", err)
	}
	if out, err := g.exec("sibling", "e", "echo lives"); out != "lives" || err != nil {
		g.Errorf("the sibling: %q, %v", out, err)
	}
	if err := g.update("c", `{"pids":{"limit":5}}`); err != nil {
		g.Errorf("update: %v", err)
	}
	if after := g.stats("c").GetCpu().GetUsageUsec(); after != before {
		g.Errorf("it ran %d us while it was paused", after-before)
	}
	if err := g.signal("c", 15); err != nil { // delivered at the resume
		g.Error(err)
	}
	if _, err := g.ResumeContainer(g.ctx, &agentv1.ResumeContainerRequest{ContainerId: "c"}); err != nil {
		g.Fatal(err)
	}
	if exit := g.wait("c"); exit.GetExitStatus() != 7 {
		g.Errorf("exit %v", exit)
	}
	for _, how := range []string{"killed", "removed"} {
		g.run(how, "sleep 1000", nil)
		if err := pause(how); err != nil {
			g.Fatal(err)
		}
		if how == "killed" {
			if err := g.signal(how, 9); err != nil {
				g.Error(err)
			}
			if exit := g.wait(how); exit.GetExitStatus() != 137 {
				g.Errorf("exit %v", exit)
			}
		}
	}
	for _, id := range []string{"c", "sibling", "killed", "removed"} {
		if err := g.remove(id); err != nil {
			g.Error(err)
		}
	}
}

func testCPUs(g *guest) {
	g.run("c", "sleep 1000", nil)
	for _, want := range []uint32{2, 1, 2} {
		begin := time.Now()
		answer, err := g.OnlineResources(g.ctx, &agentv1.OnlineResourcesRequest{Cpus: want})
		if err != nil || answer.GetCpus() != want || answer.GetMemoryBytes() < 128<<20 {
			g.Errorf("%d CPUs: %v, %v", want, answer, err)
		}
		g.Logf("%d CPUs: %s", want, time.Since(begin))
		if out, err := g.exec("c", "e", "nproc"); out != strconv.Itoa(int(want)) || err != nil {
			g.Errorf("nproc says %q, %v; want %d", out, err, want)
		}
		effective := "0-1"
		if want == 1 {
			effective = "0"
		}
		if got := g.file("c", "cpuset.cpus.effective"); got != effective {
			g.Errorf("cpuset %q, want %q", got, effective)
		}
	}
	if err := g.remove("c"); err != nil {
		g.Error(err)
	}
}

// TestMemory holds that what depends on the guest's memory follows it, whether the agent is
// asked to wait for it or sees it come and go by itself.
func TestMemory(t *testing.T) {
	const bootMiB, kept = 640, 3238 // with huge pages, for which the kernel would keep 30 MiB
	g := boot(t, func(c *hypervisor.Config) {
		c.MemoryMiB, c.MaxMemoryMiB = bootMiB, bootMiB+512
		c.KernelParams = fmt.Sprint("sysctl.vm.min_free_kbytes=", kept)
	})
	g.run("c", "sleep 1000", nil)
	look := func() (keptKiB, limit uint64) {
		t.Helper()
		out, err := g.exec("c", "look", "cat /proc/sys/vm/min_free_kbytes")
		if err != nil {
			t.Fatal(err)
		}
		keptKiB, err = strconv.ParseUint(out, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return keptKiB, g.stats("").GetMemory().GetUsageLimit()
	}
	const reserved = 48 << 20
	if keptKiB, limit := look(); keptKiB != kept || limit < (bootMiB-128)<<20 || limit > (bootMiB-64)<<20 {
		t.Errorf("after the boot: %d KiB kept free, a limit of %d MiB", keptKiB, limit>>20)
	}
	resizer, ok := g.vm.(hypervisor.Resizer)
	if !ok {
		t.Fatal("the VM cannot be resized")
	}
	for _, want := range []int{bootMiB + 512, bootMiB, bootMiB + 256} {
		begin := time.Now()
		before, err := g.OnlineResources(g.ctx, &agentv1.OnlineResourcesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := resizer.Resize(g.ctx, hypervisor.Size{VCPUs: 2, MemoryMiB: want})
		if err != nil || got.MemoryMiB != want {
			t.Fatalf("%d MiB: %v, %v", want, got, err)
		}
		r := &agentv1.OnlineResourcesRequest{}
		if got.MemoryMiB > bootMiB {
			r.MemoryBytes = before.GetMemoryBytes() + uint64(want-bootMiB)<<20
		}
		answer, err := g.OnlineResources(g.ctx, r)
		if err != nil || answer.GetMemoryBytes() < r.GetMemoryBytes() {
			t.Fatalf("%d MiB: %v, %v", want, answer, err)
		}
		took := time.Since(begin)
		total, available := answer.GetMemoryBytes(), answer.GetAvailableBytes()
		if total > uint64(want)<<20 || total < uint64(want-64)<<20 || available > total || available < total/2 {
			t.Errorf("%d MiB: %v", want, answer)
		}
		keptKiB, limit := look()
		if limit != total-reserved {
			t.Errorf("%d MiB: a limit of %d MiB of %d", want, limit>>20, total>>20)
		}
		if most := uint64(math.Sqrt(float64(total>>10) * 16)); keptKiB != max(kept, most) {
			t.Errorf("%d MiB: %d KiB kept free, want %d", want, keptKiB, max(kept, most))
		}
		t.Logf("%d MiB in %s: MemTotal %d MiB, available %d, containers %d, kept free %d KiB", want, took, total>>20, available>>20, limit>>20, keptKiB)
	}
	// What goes is followed without a call.
	if _, err := resizer.Resize(g.ctx, hypervisor.Size{VCPUs: 2, MemoryMiB: bootMiB}); err != nil {
		t.Fatal(err)
	}
	for {
		keptKiB, limit := look()
		if limit <= (bootMiB-64)<<20 && keptKiB == kept {
			break
		}
		if g.ctx.Err() != nil {
			t.Fatalf("%d KiB kept free, a limit of %d MiB", keptKiB, limit>>20)
		}
	}
}
