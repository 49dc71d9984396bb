package cri

import (
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// burned is how much of one CPU a container uses over a while.
func (c *container) burned(while time.Duration) float64 {
	c.e.Helper()
	before, began := c.usage(), time.Now()
	time.Sleep(while) // a rate takes time
	after, took := c.usage(), time.Since(began)
	return float64(after.user+after.system-before.user-before.system) / float64(took)
}

func pinned(cpus string) func(*runtime.LinuxContainerResources) {
	return func(r *runtime.LinuxContainerResources) { r.CpusetCpus, r.CpusetMems = cpus, "0" }
}

// TestLimitsOfContainers measures what each container of a pod can come to.
func TestLimitsOfContainers(t *testing.T) {
	const while = 4 * time.Second
	each(t, setup{once: true}, func(e *env) {
		p := e.run("limits", asks(2000, 512))

		// Half of a CPU, of which a burner would have a whole one.
		half := p.start("half", "exec /hog cpu user", e.hog(), limits(300, 64))
		half.ready()
		got := half.burned(while)
		e.Logf("with a quota of 0.3 CPUs a burner has %.2f", got)
		if got < 0.1 || got > 0.4 {
			e.Errorf("with a quota of 0.3 CPUs a burner has %.2f", got)
		}
		half.want("cd /sys/fs/cgroup; cat cpu.stat cpu/cpu.stat 2>/dev/null | awk '/^nr_throttled/ {print ($2 > 0)}'", "1")
		half.stop()

		// One CPU of the two is the only one there is.
		one := p.start("one", idle, limits(1000, 64, pinned("0")))
		one.want("nproc; grep Cpus_allowed_list /proc/self/status | cut -f 2 | grep -c '^[0-9]$'", "1\n1")
		one.stop()

		// By weight, on that one CPU.
		heavy := p.start("heavy", "exec /hog cpu user", e.hog(), limits(0, 64, pinned("0"), shares(4096)))
		light := p.start("light", "exec /hog cpu user", e.hog(), limits(0, 64, pinned("0"), shares(512)))
		heavy.ready()
		light.ready()
		beforeHeavy, beforeLight := heavy.usage(), light.usage()
		time.Sleep(while)
		afterHeavy, afterLight := heavy.usage(), light.usage()
		h, l := afterHeavy.user-beforeHeavy.user, afterLight.user-beforeLight.user
		e.Logf("with eight times the shares a burner has %v, the other %v", h, l)
		if h < 3*l || l == 0 {
			e.Errorf("with eight times the shares a burner has %v of CPU, the other %v", h, l)
		}
		heavy.stop()
		light.stop()

		// Swap: the guest has none, and the limit says so.
		swap := p.start("swap", idle, limits(0, 64, func(r *runtime.LinuxContainerResources) { r.MemorySwapLimitInBytes = r.MemoryLimitInBytes }))
		if got := swap.cgroupValue("memory/memory.memsw.limit_in_bytes 2>/dev/null || echo 67108864", "memory.swap.max"); got != "0" && (e.isHusk() || got != "67108864") {
			e.Errorf("limit of swap is %s", got)
		}
		swap.stop()

		if e.isHusk() { // the host's cgroups are of version 1, where there is none of this
			own := p.start("own", idle, limits(0, 64, func(r *runtime.LinuxContainerResources) {
				r.Unified = map[string]string{"memory.high": "50331648", "pids.max": "24"}
			}))
			own.want("cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/pids.max", "50331648\n24")
			if r := own.exec("for i in $(seq 40); do sleep 20 & done 2>&1; echo all"); !strings.Contains(r.stdout+r.stderr, "an't fork") {
				e.Errorf("40 processes where 24 are allowed: %v", r)
			}
			own.stop()
			_, err := p.tryStart("bad", idle, limits(0, 64, func(r *runtime.LinuxContainerResources) {
				r.Unified = map[string]string{"nonsense.max": "1"}
			}))
			e.wantError("a file of cgroups that is not there", err, "nonsense.max")
			_, err = p.tryStart("far", idle, limits(0, 64, pinned("0-900")))
			e.wantError("a cpuset that the machine has not", err, "cpus")
		}
		p.remove()
		e.settled()
	})
}

func shares(n int64) func(*runtime.LinuxContainerResources) {
	return func(r *runtime.LinuxContainerResources) { r.CpuShares = n }
}
