package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// mib is a mebibyte, in bytes.
const mib = 1 << 20

func ptr[T any](v T) *T { return &v }

// hog has a container mount the program of test/hog.
func (e *env) hog() specs.Mount {
	e.Helper()
	return e.goBuild("build", "./test/hog")
}

// TestLimitsOfTheSpec has one container for each field of an OCI spec's resources that
// ctr has no flag for, and looks at what they do.
func TestLimitsOfTheSpec(t *testing.T) {
	fork := "i=0; while [ $i -lt 30 ]; do sleep 1000 & i=$((i+1)); done 2>/dev/null; echo all"
	for _, test := range []struct {
		name, script string
		edit         func(*specs.LinuxResources)
		want         string
		husk         bool // runc has no counterpart on this host
	}{
		{"Reservation", cgroupFile + "control memory.low memory/memory.soft_limit_in_bytes", func(r *specs.LinuxResources) {
			r.Memory = &specs.LinuxMemory{Limit: ptr[int64](64 * mib), Reservation: ptr[int64](32 * mib)}
		}, fmt.Sprintln(32 * mib), false},
		{"Weight", cgroupFile + "control cpu.weight cpu/cpu.shares | awk '{print ($1 != 100 && $1 != 1024)}'", func(r *specs.LinuxResources) {
			r.CPU = &specs.LinuxCPU{Shares: ptr[uint64](4096)}
		}, "1\n", false},
		{"Cpuset", "nproc", func(r *specs.LinuxResources) {
			r.CPU = &specs.LinuxCPU{Cpus: "1", Quota: ptr[int64](200000), Period: ptr[uint64](100000)}
		}, "1\n", false},
		{"Pids", fork, func(r *specs.LinuxResources) { r.Pids = &specs.LinuxPids{Limit: ptr[int64](12)} }, "", false},
		{"PidsWithoutLimit", fork, func(r *specs.LinuxResources) { r.Pids = &specs.LinuxPids{Limit: ptr[int64](-1)} }, "all\n", false},
		{"Unified", cgroupFile + "control memory.high; control pids.max", func(r *specs.LinuxResources) {
			r.Unified = map[string]string{"memory.high": fmt.Sprint(48 * mib), "pids.max": "31"}
		}, fmt.Sprintf("%d\n31\n", 48*mib), true},
		// Rules are of the guest's devices, by its numbers.
		{"DeviceDenied", "cat /dev/null; head -c 1 /dev/zero | wc -c", func(r *specs.LinuxResources) {
			r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: false, Type: "c", Major: ptr[int64](1), Minor: ptr[int64](3), Access: "rwm"})
		}, "1\n", false},
		{"DeviceOfAWrongNumber", "mknod /own c 1 11 && cat /own 2>&1", func(r *specs.LinuxResources) {
			r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr[int64](1), Minor: ptr[int64](12), Access: "rwm"})
		}, "cat: can't open '/own': Operation not permitted\n", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			run := each
			if test.husk {
				run = eachHusk
			}
			run(t, func(e *env) {
				if e.generation.Name != "2.4" && !*longFlag {
					e.Skip("containerd passes specs on as they are; -long runs it")
				}
				if r := e.runSpec(test.script, func(s *specs.Spec) {
					s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
					test.edit(s.Linux.Resources)
				}); r.stdout != test.want {
					e.Errorf("%v, want stdout %q", r, test.want)
				}
			})
		})
	}
}

// TestLimitsThatAGuestCannotHaveAreRefused by their names, before anything boots.
func TestLimitsThatAGuestCannotHaveAreRefused(t *testing.T) {
	memory := func(m specs.LinuxMemory) func(*specs.LinuxResources) {
		return func(r *specs.LinuxResources) { r.Memory = &m }
	}
	throttle := specs.LinuxThrottleDevice{Rate: 1 << 20}
	throttle.Major, throttle.Minor = 8, 0
	weight := specs.LinuxWeightDevice{Weight: ptr[uint16](100)}
	weight.Major = 8
	eachHusk(t, func(e *env) {
		if e.generation.Name != "2.4" && !*longFlag {
			e.Skip("containerd passes specs on as they are; -long runs it")
		}
		for words, edit := range map[string]func(*specs.LinuxResources){
			"memory.swappiness":       memory(specs.LinuxMemory{Swappiness: ptr[uint64](10)}),
			"memory.disableOOMKiller": memory(specs.LinuxMemory{DisableOOMKiller: ptr(true)}),
			//lint:ignore SA1019 it may still be set
			"memory.kernel":       memory(specs.LinuxMemory{Kernel: ptr[int64](64 * mib)}),
			"memory.kernelTCP":    memory(specs.LinuxMemory{KernelTCP: ptr[int64](64 * mib)}),
			"cpu.realtimeRuntime": func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{RealtimeRuntime: ptr[int64](1000)} },
			"cpu.realtimePeriod":  func(r *specs.LinuxResources) { r.CPU = &specs.LinuxCPU{RealtimePeriod: ptr[uint64](1000)} },
			"network":             func(r *specs.LinuxResources) { r.Network = &specs.LinuxNetwork{ClassID: ptr[uint32](1)} },
			"rdma": func(r *specs.LinuxResources) {
				r.Rdma = map[string]specs.LinuxRdma{"mlx5_0": {HcaHandles: ptr[uint32](1)}}
			},
			"blockIO, throttleReadBpsDevice": func(r *specs.LinuxResources) {
				r.BlockIO = &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle}}
			},
			"blockIO, throttleWriteIOPSDevice": func(r *specs.LinuxResources) {
				r.BlockIO = &specs.LinuxBlockIO{ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{throttle}}
			},
			"blockIO, weightDevice": func(r *specs.LinuxResources) {
				r.BlockIO = &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{weight}}
			},
			"cgroup.procs": func(r *specs.LinuxResources) { r.Unified = map[string]string{"../../cgroup.procs": "1"} },
		} {
			field, _, _ := strings.Cut(words, ",")
			r := e.runSpec("echo ran", func(s *specs.Spec) { edit(s.Linux.Resources) })
			if r.code == 0 || r.stdout != "" || len(lines(r.stderr)) != 1 || !strings.Contains(r.stderr, field) {
				e.Errorf("%s: %v, want one line that names it", words, r)
			}
			if processes, err := e.d.Processes(); err != nil || slices.ContainsFunc(processes, func(p daemon.Process) bool { return strings.HasPrefix(p.Name, "qemu") }) {
				e.Errorf("%s: after the refusal there are %v, %v", words, processes, err)
			}
		}
	})
}

// TestLimitsOfHugePages are by page size. (The kubelet says 0 for each that nobody
// asked for, but containerd passes that on only where the host can limit them, too.)
func TestLimitsOfHugePages(t *testing.T) {
	const page = 2 * mib
	eachHusk(t, func(e *env) { // the host has no huge page to give
		if e.generation.Name != "2.4" && !*longFlag {
			e.Skip("containerd passes specs on as they are; -long runs it")
		}
		for pages, want := range map[uint64]string{0: "0\nnone\n0\n", 2: "4194304\n4194304\n4194304\n"} {
			const script = `cat /sys/fs/cgroup/hugetlb.2MB.max
fallocate -l 4194304 /mnt/huge/two 2>/dev/null && stat -c %s /mnt/huge/two || echo none
fallocate -l 6291456 /mnt/huge/two 2>/dev/null && echo too many; cat /sys/fs/cgroup/hugetlb.2MB.current`
			r := e.runSpec(script, func(s *specs.Spec) {
				s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: pages * page}}
				s.Mounts = append(s.Mounts,
					specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}},
					specs.Mount{Destination: "/mnt/huge", Type: "bind", Source: e.hugePages(), Options: []string{"rbind", "rw"}})
			})
			if r.stdout != want {
				e.Errorf("%d huge pages: %v, want stdout %q", pages, r, want)
			}
		}
	})
}

// hugePages is a kubelet's volume of them.
func (e *env) hugePages() string {
	e.Helper()
	host := e.TempDir()
	if err := unix.Mount("none", host, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		if err := unix.Unmount(host, 0); err != nil {
			e.Error(err)
		}
	})
	return host
}

// TestSizeOfALoneContainer is what its spec says.
func TestSizeOfALoneContainer(t *testing.T) {
	eachHusk(t, func(e *env) {
		const script = "nproc; awk '/^MemTotal/ {print int($2/1024)}' /proc/meminfo"
		for _, tt := range []struct {
			flags             []string
			cpus, least, most int
		}{
			{flags: []string{"--memory-limit", fmt.Sprint(512 * mib), "--cpus", "1.5"}, cpus: 2, least: 512, most: 512 + 512/20 + 44},
			{flags: nil, cpus: 1, least: 180, most: 300},
		} {
			r := e.sh(script, tt.flags...)
			var cpus, total int
			if _, err := fmt.Sscan(r.stdout, &cpus, &total); err != nil || cpus != tt.cpus || total < tt.least || total > tt.most {
				e.Errorf("%v: %v; want %d CPUs and %d to %d MiB", tt.flags, r, tt.cpus, tt.least, tt.most)
			}
		}
		e.oneClearError(e.sh(script, "--memory-limit", "524288"), "memory limit", "524288", "raise")
		e.oneClearError(e.sh(script, "--annotation", "io.husk.default_vcpus=2"), "io.husk.default_vcpus", "allowed_annotations")
		e.configure(daemon.Settings{"runtime": {"allowed_annotations": []string{"io.husk.default_*"}}, "hypervisor": {"max_vcpus": 2}})
		e.oneClearError(e.sh(script, "--cpus", "2.5"), "CPU limit", "2.5", "max_vcpus")
		if r := e.sh("nproc", "--annotation", "io.husk.default_vcpus=2"); r.stdout != "2\n" {
			e.Errorf("%v, want 2 CPUs by an annotation", r)
		}
	})
}

// taskState is what containerd has a task's be.
func (e *env) taskState(id string) string {
	e.Helper()
	for _, line := range lines(e.must("task", "ls")) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == id {
			return fields[2]
		}
	}
	return "none"
}

// TestPauseOfALoneContainer is by the task API, where there is no pod.
func TestPauseOfALoneContainer(t *testing.T) {
	each(t, func(e *env) {
		events := e.start("events")
		id := e.detached("run", "sleep 1000")
		e.must("task", "pause", id)
		if got := e.taskState(id); got != "PAUSED" {
			e.Errorf("the task is %s", got)
		}
		if r := e.exec(id, "no", "true"); r.code == 0 || !strings.Contains(r.stderr, "paused") {
			e.Errorf("exec in a paused container: %v", r)
		}
		e.must("task", "resume", id)
		if got := e.taskState(id); got != "RUNNING" {
			e.Errorf("the task is %s", got)
		}
		if r := e.exec(id, "yes", "echo", "here"); r.stdout != "here\n" {
			e.Errorf("%v", r)
		}
		events.expect("/tasks/paused")
		events.expect("/tasks/resumed")
		e.must("task", "pause", id)
		if strings.Contains(*runtimeFlag, "husk") { // runc's processes get the signal when they are thawed
			e.must("task", "kill", "-s", "SIGKILL", id)
		}
		e.must("task", "rm", "--force", id)
		e.must("container", "rm", id)
		if err := events.cmd.Process.Kill(); err != nil {
			e.Error(err)
		}
		<-events.ended
		events.cancel()
	})
}

// TestOOMOfALoneContainer tells of it before the end.
func TestOOMOfALoneContainer(t *testing.T) {
	each(t, func(e *env) {
		events := e.start("events")
		hog := e.hog()
		path := e.spec(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, hog)
			s.Process.Args = []string{hog.Destination, "memory", "100"}
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr[int64](48 * mib)}
		})
		id := e.d.ID("run")
		e.must(e.runArgs("-d", "--null-io", "--config", path, id)...)
		events.expect(`"exit_status":137`)
		events.expect("/tasks/oom") // runc's shim forgets it where the task is deleted before
		e.must("task", "rm", id)
		e.must("container", "rm", id)
		if out := events.stdout.String(); strings.Contains(*runtimeFlag, "husk") && strings.Index(out, "/tasks/oom") > strings.Index(out, "/tasks/exit") {
			e.Errorf("the exit came before its reason: %s", out)
		}
		if err := events.cmd.Process.Kill(); err != nil {
			e.Error(err)
		}
		<-events.ended
		events.cancel()
	})
}

// statsCeiling is for the median of calls by ctr, which is a process each time.
const statsCeiling = time.Second

// TestStatsOfALoneContainer are those of its cgroup.
func TestStatsOfALoneContainer(t *testing.T) {
	each(t, func(e *env) {
		hog := e.hog()
		path := e.spec(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, hog)
			s.Process.Args = []string{hog.Destination, "memory", "64"}
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr[int64](96 * mib)}
		})
		id := e.d.ID("run")
		e.must(e.runArgs("-d", "--null-io", "--config", path, id)...)
		var text string
		used := func() uint64 {
			e.Helper()
			text = e.must("task", "metrics", "--format", "json", id)
			var m struct {
				Memory struct{ Usage json.RawMessage }
			}
			if err := json.Unmarshal([]byte(text), &m); err != nil {
				e.Fatalf("decode metrics: %v: %s", err, text)
			}
			var n uint64
			if json.Unmarshal(m.Memory.Usage, &n) == nil {
				return n
			}
			var v1 struct{ Usage uint64 }
			if err := json.Unmarshal(m.Memory.Usage, &v1); err != nil {
				e.Fatalf("decode metrics: %v: %s", err, text)
			}
			return v1.Usage
		}
		ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
		defer cancel()
		for used() < 64*mib && ctx.Err() == nil { // nobody tells when it is there
		}
		if n := used(); n < 64*mib || n > 96*mib {
			e.Errorf("usage of memory is %d bytes, of which 64 MiB are taken, by a limit of 96: %s", n, text)
		}
		var took []time.Duration
		for range 9 {
			began := time.Now()
			used()
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		e.Logf("ctr task metrics: median %v of %d, worst %v", took[len(took)/2], len(took), took[len(took)-1])
		if took[len(took)/2] > statsCeiling {
			e.Errorf("half of the calls took more than %v", took[len(took)/2])
		}
		e.must("task", "rm", "--force", id)
		e.must("container", "rm", id)
	})
}

// TestALargeGuestEnds has a container fill a tmpfs of 1.5 GiB: containerd gives the shim
// 3 s to end after that, which it did not where the host first had to free the memory.
func TestALargeGuestEnds(t *testing.T) {
	eachHusk(t, func(e *env) {
		const size = 1536
		for range 2 {
			r := e.sh(fmt.Sprintf("dd if=/dev/zero of=/big/f bs=1M count=%d 2>/dev/null; stat -c %%s /big/f", size),
				"--memory-limit", fmt.Sprint((size+128)*mib), "--mount", fmt.Sprintf("type=tmpfs,src=tmpfs,dst=/big,options=size=%dm", size+64))
			if r.code != 0 || r.stdout != fmt.Sprintln(size*mib) || r.stderr != "" {
				e.Error(r)
			}
		}
	})
}
