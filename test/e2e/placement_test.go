package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// farCPU is a CPU of the host, and its memory node, where there is another node with
// CPUs.
func farCPU(t *testing.T) (cpu, node int) {
	t.Helper()
	lists, _ := filepath.Glob("/sys/devices/system/node/node[0-9]*/cpulist") // the pattern is well-formed
	with := 0
	for _, path := range lists {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		list := strings.TrimSpace(string(raw)) // such as 0-3,8-11
		if list == "" {
			continue
		}
		with++
		last, err := strconv.Atoi(list[strings.LastIndexAny(list, ",-")+1:])
		if err != nil {
			t.Fatal(err)
		}
		if last >= cpu {
			cpu = last
			if node, err = strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(path)), "node")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if with < 2 {
		t.Skipf("the host has %d memory nodes with CPUs, it takes 2: rig -cpus 2 -nodes 2 has", with)
	}
	return cpu, node
}

// On a host of several nodes a VM that is bound to a CPU has that for its vCPU and for
// nothing else, and its memory from that CPU's node.
func TestPlacementOnTwoNodes(t *testing.T) {
	cpu, node := farCPU(t)
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"hypervisor": {"vcpu_pinning": true}})
		path := e.spec(func(s *specs.Spec) {
			s.Process.Args = []string{"sleep", "1000"}
			s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: fmt.Sprint(cpu), Quota: ptr[int64](100000), Period: ptr[uint64](100000)}
		})
		id := e.d.ID("run")
		e.must(e.runArgs("-d", "--null-io", "--config", path, id)...)
		e.says(id, "fill", "head -c 33554432 /dev/zero > /dev/shm/f; nproc", "1\n")

		p := e.status(id)
		if p.CPUs != fmt.Sprint(cpu) || p.Nodes != fmt.Sprint(node) || len(p.VCPUs) != 1 || p.VCPUs[0].CPUs != fmt.Sprint(cpu) ||
			!p.Placement.Pinned || p.Placement.CPUs != fmt.Sprint(cpu) || p.Placement.MemoryNodes != fmt.Sprint(node) || len(p.Warnings) > 0 {
			e.Errorf("husk status has not one vCPU on CPU %d, of node %d: %+v", cpu, node, p)
		}
		e.alone(p.VCPUs[0].Thread, cpu)
		e.memoryOn(e.process("qemu-system").PID, node)

		e.must("task", "kill", "--signal", "SIGKILL", id)
		e.must("task", "rm", "--force", id)
		e.must("container", "rm", id)
	})
}

// alone wants that thread, of all that the only sandbox has, to run on that CPU.
func (e *env) alone(thread, cpu int) {
	e.Helper()
	list, err := e.d.Processes()
	e.made(err)
	found := false
	for _, p := range list {
		if !slices.ContainsFunc(hostParts, func(name string) bool { return strings.HasPrefix(p.Name, name) }) {
			continue
		}
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
		e.made(err)
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			e.made(err)
			var set unix.CPUSet
			if err := unix.SchedGetaffinity(tid, &set); err != nil {
				continue // it has ended since
			}
			found = found || tid == thread
			if tid == thread && set.Count() != 1 || set.IsSet(cpu) != (tid == thread) {
				e.Errorf("thread %d of %s may run on %d CPUs, on CPU %d: %v; the vCPU's is %d", tid, p.Name, set.Count(), cpu, set.IsSet(cpu), thread)
			}
		}
	}
	if !found {
		e.Errorf("no process has the vCPU's thread %d: %v", thread, list)
	}
}

// memoryOn wants a VM's memory to be of that node, what it has touched and the rest.
func (e *env) memoryOn(pid, node int) {
	e.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", pid))
	e.made(err)
	pages := 0
	for _, line := range lines(string(maps)) {
		if !strings.Contains(line, "memfd:") {
			continue
		}
		if !strings.Contains(line, fmt.Sprintf(" bind:%d ", node)) {
			e.Errorf("it is not bound to node %d: %s", node, line)
		}
		for _, field := range strings.Fields(line) {
			var on, n int
			if _, err := fmt.Sscanf(field, "N%d=%d", &on, &n); err != nil {
				continue
			}
			if pages += n; on != node {
				e.Errorf("%d pages are of node %d: %s", n, on, line)
			}
		}
	}
	if pages < 32<<20/os.Getpagesize() {
		e.Errorf("of the guest's memory %d pages are there; it has written 32 MiB", pages)
	}
}
