package cri

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// wantMemory wants a guest to have what was asked for, and above it little more than
// what its system takes, so that a container can use all of its limit.
func (c *container) wantMemory(asked int) {
	c.e.Helper()
	got := c.memTotal()
	c.e.Logf("of %d MiB asked for, MemTotal is %d", asked, got)
	if got < asked || got > asked+asked/20+44 {
		c.e.Errorf("MemTotal is %d MiB, asked for were %d", got, asked)
	}
}

// TestSizeIsWhatThePodAsksFor looks at it as programs do.
func TestSizeIsWhatThePodAsksFor(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		// 2 CPUs and 512 MiB, of two containers.
		p := e.run("sum", asks(2000, 512))
		a := p.start("a", idle, limits(1500, 384))
		b := p.start("b", idle, limits(500, 128))
		a.want("nproc; grep -c ^processor /proc/cpuinfo; ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "2\n2\n2")
		a.wantMemory(512)
		a.want("free -m | awk '/^Mem/ {print ($2 >= 512)}'", "1")
		for c, want := range map[*container][2]string{a: {"402653184", "150000 100000"}, b: {"134217728", "50000 100000"}} {
			if got := c.memoryMax(); got != want[0] {
				e.Errorf("limit of memory is %s, want %s", got, want[0])
			}
			if got := c.cpuMax(); got != want[1] {
				e.Errorf("quota is %s, want %s", got, want[1])
			}
		}
		p.remove()

		// A fraction counts whole.
		p = e.run("fraction", asks(1500, 256))
		c := p.start("c", idle, limits(1500, 256))
		c.want("nproc", "2")
		c.wantMemory(256)
		// Nearly all of it can be used.
		full := p.start("full", "exec /hog memory 240", e.hog(), limits(0, 256))
		full.ready()
		full.running()
		p.remove()
		if (e.generation != "2.4" || e.handler != "husk") && !*longFlag {
			return // the rest is the same by every way
		}

		// No limit: the default, which the container may use as it is.
		e.configure(daemon.Settings{"hypervisor": {"default_vcpus": 2, "default_memory_mib": 320}})
		p = e.run("default", asks(0, 0))
		c = p.start("c", idle, limits(0, 0))
		c.want("nproc", "2")
		if got := c.memTotal(); got < 220 || got > 320 {
			e.Errorf("MemTotal is %d MiB by a default of 320", got)
		}
		if got := c.memoryMax(); got != "max" {
			e.Errorf("limit of memory is %s", got)
		}
		if got := c.cpuMax(); got != "max 100000" {
			e.Errorf("quota is %s", got)
		}
		p.remove()
		e.settled()
	})
}

// TestSizeThatCannotBeIsRefused before anything boots, by a reason that says what to do.
func TestSizeThatCannotBeIsRefused(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		began := time.Now()
		e.refused(e.podConfig("small", asks(100, 0), func(c *runtime.PodSandboxConfig) { c.Linux.Resources.MemoryLimitInBytes = 512 << 10 }),
			"memory limit", "524288 bytes", "raise")
		e.configure(daemon.Settings{"hypervisor": {"max_vcpus": 3, "max_memory_mib": 1024}})
		e.refused(e.podConfig("large", asks(100, 4096)), "memory limit", "4096 MiB", "at most", "1024", "max_memory_mib")
		e.refused(e.podConfig("wide", asks(8000, 512)), "CPU limit", "8", "at most 3", "max_vcpus")
		if took := time.Since(began); took > 30*time.Second*patience() {
			e.Errorf("three refusals took %v", took)
		}
		if list := e.processes("qemu-system"); len(list) != 0 {
			e.Errorf("there are %v", list)
		}
	})
}

// TestSizeByAnnotations: those that the configuration allows count, all others are
// refused by their names.
func TestSizeByAnnotations(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		const vcpus, memory, kernel = "io.husk.default_vcpus", "io.husk.default_memory_mib", "io.husk.kernel_params"
		e.refused(e.podConfig("none", annotated(vcpus, "2")), vcpus, "allowed_annotations")
		e.configure(daemon.Settings{"runtime": {"allowed_annotations": []string{vcpus, memory, "io.husk.max_vcpus"}}})
		for name, tt := range map[string]struct {
			key, value string
			words      []string
		}{
			"not-allowed": {kernel, "quiet", []string{kernel, "allowed_annotations"}},
			"unknown":     {"io.husk.nonsense", "1", []string{"io.husk.nonsense"}},
			"zero":        {vcpus, "0", []string{vcpus, "0"}},
			"too-many":    {vcpus, "100000", []string{vcpus, "100000"}},
			"no-number":   {memory, "plenty", []string{memory, "plenty"}},
			"too-small":   {memory, "1", []string{memory, "1"}},
			"negative":    {memory, "-512", []string{memory, "-512"}},
		} {
			e.Logf("an annotation that is refused: %s", name)
			e.refused(e.podConfig(name, annotated(tt.key, tt.value)), tt.words...)
		}
		p := e.run("allowed", annotated(vcpus, "2"), annotated(memory, "300"), annotated("example.com/other", "of somebody else"))
		c := p.start("c", idle)
		c.want("nproc", "2")
		if got := c.memTotal(); got < 220 || got > 300 {
			e.Errorf("MemTotal is %d MiB by an annotation of 300", got)
		}
		// What the pod's containers are limited to is not what an annotation speaks of.
		q := e.run("both", asks(500, 384), annotated(vcpus, "2"))
		d := q.start("d", idle, limits(500, 384))
		d.want("nproc", "1")
		d.wantMemory(384)
		p.remove()
		q.remove()
		e.settled()
	})
}

// TestSizeOnTheHost: all of a pod is in the pod's cgroup from the beginning, and what its
// guest takes is charged there.
func TestSizeOnTheHost(t *testing.T) {
	const taken = 192 // MiB, much more than what a guest has touched and not given back
	each(t, setup{husk: true}, func(e *env) {
		p := e.run("host", e.podCgroup("host", 0), asks(1000, 256))
		parent := p.config.Linux.CgroupParent
		for _, process := range e.processes("") {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", process.PID))
			if err != nil {
				continue // it has ended since
			}
			for line := range strings.Lines(string(data)) {
				// id:controllers:path
				fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
				limits := fields[1] == "" && len(e.hierarchies()) == 1
				for _, controller := range []string{"memory", "cpu", "pids", "cpuset"} {
					limits = limits || slices.Contains(strings.Split(fields[1], ","), controller)
				}
				if limits && !strings.HasPrefix(fields[2], parent+"/") {
					e.Errorf("%v is in %s, want it below %s", process, strings.TrimSpace(line), parent)
				}
			}
		}
		before := e.charged(parent)
		machine := e.machine(p)
		if resident := e.residentBytes(machine); before < resident/2 {
			e.Errorf("%d bytes are charged to the pod, its machine has %d", before, resident)
		}
		c := p.start("c", fmt.Sprintf("exec /hog memory %d", taken), e.hog())
		c.ready()
		after := e.charged(parent)
		e.Logf("charged to the pod are %d MiB, %d MiB with %d MiB taken in the guest", before/mib, after/mib, taken)
		if after < before+taken*mib*3/4 {
			e.Errorf("charged to the pod are %d MiB with %d MiB taken in the guest, were %d", after/mib, taken, before/mib)
		}
		// As the kubelet's summary has it.
		e.within(time.Minute, "the stats of the pod are those of its cgroup", func(context.Context) error {
			s := p.criStats().GetLinux()
			if cpu := s.GetCpu().GetUsageCoreNanoSeconds().GetValue(); cpu == 0 {
				return fmt.Errorf("cpu is %v", s.GetCpu())
			}
			if used := s.GetMemory().GetUsageBytes().GetValue(); used < taken*mib {
				return fmt.Errorf("memory is %v", s.GetMemory())
			}
			return nil
		})
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY {
			e.Errorf("pod is %v", s.State)
		}
	})
}

// charged is what a cgroup of the host's is charged for, in bytes.
func (e *env) charged(path string) int {
	e.Helper()
	for _, hierarchy := range e.hierarchies() {
		for _, name := range []string{"memory.usage_in_bytes", "memory.current"} {
			data, err := os.ReadFile(filepath.Join(hierarchy, path, name))
			if err != nil {
				continue
			}
			n, err := strconv.Atoi(string(bytes.TrimSpace(data)))
			if err != nil {
				e.Fatal(err)
			}
			return n
		}
	}
	e.Fatalf("nothing tells what is charged to %s", path)
	return 0
}
