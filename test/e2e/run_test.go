package e2e

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/test/images"
)

func TestRunPrintsToBothStreams(t *testing.T) {
	each(t, func(e *env) {
		r := e.sh("echo out; echo err >&2")
		if r.stdout != "out\n" || r.stderr != "err\n" || r.code != 0 {
			e.Errorf("%v", r)
		}
	})
}

func TestRunHasAKernelOfItsOwn(t *testing.T) {
	eachHusk(t, func(e *env) {
		host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			e.Fatal(err)
		}
		r := e.sh("cat /proc/sys/kernel/random/boot_id")
		if r.code != 0 || len(strings.TrimSpace(r.stdout)) != 36 || r.stdout == string(host) {
			e.Errorf("boot id %v, the host's is %s", r, host)
		}
	})
}

func TestExitCode(t *testing.T) {
	each(t, func(e *env) {
		for _, want := range []int{0, 3, 127, 255} {
			if r := e.sh(fmt.Sprintf("exit %d", want)); r.code != want || r.stderr != "" {
				e.Errorf("exit %d: %v", want, r)
			}
		}
	})
}

func TestExitCodeOfASignal(t *testing.T) {
	each(t, func(e *env) {
		for signal, want := range map[string]int{"SIGTERM": 143, "SIGKILL": 137} {
			// The first process of a pid namespace ignores what it has no handler for.
			c := e.startSh(signal, "trap 'exit 143' TERM; echo ready; sleep 1000 & wait")
			c.expect("ready")
			e.must("task", "kill", "--signal", signal, e.d.ID(signal))
			if r := c.wait(); r.code != want {
				e.Errorf("%s: %v, want exit code %d", signal, r, want)
			}
		}
	})
}

func TestKillAll(t *testing.T) {
	each(t, func(e *env) {
		c := e.startSh("all", "trap 'exit 9' TERM; sh -c 'echo ready; exec sleep 1000'; echo child $?; exit 8")
		c.expect("ready")
		e.must("task", "kill", "--all", "--signal", "SIGTERM", e.d.ID("all"))
		// The shell's trap runs once its child, which had the signal too, is gone.
		if r := c.wait(); r.code != 9 {
			e.Errorf("%v, want exit code 9", r)
		}
	})
}

func TestKillReachesOneExec(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("exec", "sleep 1000")
		c := e.start(e.execArgs(id, "sleeper", "sh", "-c", "echo ready; exec sleep 1000")...)
		c.expect("ready")
		e.must("task", "kill", "--exec-id", "sleeper", "--signal", "SIGTERM", id)
		if r := c.wait(); r.code != 143 {
			e.Errorf("exec: %v, want exit code 143", r)
		}
		if r := e.exec(id, "after", "echo", "alive"); r.stdout != "alive\n" {
			e.Errorf("container after its exec was killed: %v", r)
		}
	})
}

func TestTenContainersAtOnce(t *testing.T) {
	each(t, func(e *env) {
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				name := fmt.Sprintf("c%d", i)
				if r := e.startSh(name, "echo "+name).wait(); r.stdout != name+"\n" || r.code != 0 {
					e.Errorf("%s: %v", name, r)
				}
			})
		}
		wg.Wait()
	})
}

func TestTaskPsListsTheContainersOwnProcesses(t *testing.T) {
	each(t, func(e *env) {
		id := e.d.ID("ps")
		c := e.startSh("ps", "sleep 1000 & sleep 1000 & echo ready; wait")
		c.expect("ready")
		// One line of heading, then the shell and its two children.
		if got := lines(e.must("task", "ps", id)); len(got) != 4 {
			e.Errorf("task ps: %q, want three processes", got)
		}
		e.must("task", "kill", "--signal", "SIGKILL", id)
		c.wait()
	})
}

func TestTaskPidIsTheMonitors(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("pid", "sleep 1000")
		pid := e.taskPID(id)
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil || !strings.HasPrefix(string(name), "qemu") {
			e.Errorf("task pid %d is %q, %v; want QEMU", pid, name, err)
		}
		below, err := e.d.Processes()
		if err != nil {
			e.Fatal(err)
		}
		for _, p := range below {
			if p.PID == pid {
				return
			}
		}
		e.Errorf("task pid %d is not among %v", pid, below)
	})
}

// TestProductionPath wants the fast accelerator and carrier taken where they are.
func TestProductionPath(t *testing.T) {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil || !hasVirtualization(cpu) {
		t.Skip("needs a CPU with vmx or svm, and /dev/vhost-vsock; the rig has them")
	}
	eachHusk(t, func(e *env) {
		c := e.startSh("path", "echo ready; sleep 1000")
		c.expect("ready")
		args := strings.Join(e.process("qemu-system").Args, " ")
		if !strings.Contains(args, "-accel kvm") || !strings.Contains(args, "vhost-vsock") {
			e.Errorf("QEMU runs without KVM or vhost-vsock: %s", args)
		}
		e.must("task", "kill", "--signal", "SIGKILL", e.d.ID("path"))
		c.wait()
	})
}

func hasVirtualization(cpuinfo []byte) bool {
	return bytes.Contains(cpuinfo, []byte(" vmx ")) || bytes.Contains(cpuinfo, []byte(" svm "))
}

// taskPID is the pid of a task as containerd has it.
func (e *env) taskPID(id string) (pid int) {
	e.Helper()
	for _, line := range lines(e.must("task", "ls")) {
		if fields := strings.Fields(line); fields[0] == id {
			if _, err := fmt.Sscan(fields[1], &pid); err != nil {
				e.Fatalf("read pid of %q: %v", line, err)
			}
			return pid
		}
	}
	e.Fatalf("no task %s", id)
	return 0
}

func TestCreateStartDeleteOneByOne(t *testing.T) {
	each(t, func(e *env) {
		id := e.d.ID("steps")
		e.must("container", "create", "--runtime", *runtimeFlag, images.Busybox, id, "echo", "started")
		// The container starts again after its task was deleted.
		for range 2 {
			if r := e.ctr("task", "start", "--fifo-dir", e.d.FIFODir(), id); r.stdout != "started\n" || r.code != 0 {
				e.Errorf("task start: %v", r)
			}
		}
	})
}

func TestEventsComeInOrder(t *testing.T) {
	each(t, func(e *env) {
		events := e.listen()
		id := e.d.ID("events")
		c := e.startSh("events", "echo ready; sleep 1000 & trap 'exit 3' TERM; wait")
		c.expect("ready")
		e.exec(id, "e1", "true")
		e.must("task", "kill", "--signal", "SIGTERM", id)
		c.wait()
		events.expect("/tasks/delete")
		events.end()
		var got []string
		for _, line := range lines(events.stdout.String()) {
			if topic := taskTopic.FindString(line); topic != "" && strings.Contains(line, id) {
				got = append(got, topic)
			}
		}
		want := []string{
			"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exit", "/tasks/delete",
		}
		if !slices.Equal(got, want) {
			e.Errorf("events %q, want %q", got, want)
		}
	})
}

// listen starts `ctr events` and returns when it listens. It does not tell: it
// is given something to tell.
func (e *env) listen() *command {
	e.Helper()
	c := e.start("events")
	for i := range 100 {
		e.must("image", "label", images.Busybox, fmt.Sprintf("try=%d", i))
		if c.stdout.await("/images/update", time.Second, c.ended) == nil {
			return c
		}
	}
	e.Fatal("ctr events tells nothing")
	return nil
}

// end ends a command that does not end by itself.
func (c *command) end() {
	c.cancel()
	<-c.ended
}

// taskTopic is the topic in a line of `ctr events`.
var taskTopic = regexp.MustCompile(`/tasks/[a-z-]+`)

func TestRootfsDirectory(t *testing.T) {
	each(t, func(e *env) {
		if r := e.runSpec("echo here", func(*specs.Spec) {}); r.stdout != "here\n" || r.code != 0 {
			e.Errorf("%v", r)
		}
	})
}
