package cri

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodOfTwoContainersIsJoinedAndRemoved(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("two")
		a := p.start("a", "echo to stdout; echo to stderr >&2; "+idle)
		b := p.start("b", idle)
		a.running()
		b.running()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY || s.GetNetwork().GetIp() == "" {
			e.Errorf("pod: %v, want it ready, with an address", s)
		}
		a.waitOutput("to stdout\n")
		if got := a.output("stderr"); got != "to stderr\n" {
			e.Errorf("standard error in the log: %q", got)
		}
		if r := b.exec("echo out; echo err >&2; exit 7"); r != (result{"out\n", "err\n", 7}) {
			e.Errorf("exec: %v", r)
		}
		if e.isHusk() {
			for _, name := range []string{"qemu-system", "containerd-shim"} {
				if list := e.processes(name); len(list) != 1 {
					e.Errorf("%d processes %s, want one for the pod: %v", len(list), name, list)
				}
			}
		}
		a.stop()
		if s := a.status(); s.State != runtime.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
			e.Errorf("stopped container: %v, want it exited with code 137", s)
		}
		p.stop()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
			e.Errorf("stopped pod is %v", s.State)
		}
		p.stop() // once more changes nothing
		p.remove()
		e.settled()
	})
}

func TestPodWithoutContainersIsStoppedAndRemoved(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("empty")
		p.remove()
		e.settled()
	})
}

func TestRemovingAReadyPodStopsItsContainers(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("ready")
		p.start("a", idle)
		p.start("b", "exit 3").exited()
		ctx, cancel := e.call()
		defer cancel()
		if _, err := e.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			e.Fatal(err)
		}
		e.settled()
	})
}

func TestTheLastContainerMayBeRemovedAndANewOneCreated(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("last")
		first := p.start("first", idle)
		boot := first.sh("cat /proc/sys/kernel/random/boot_id")
		first.stop()
		first.remove()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY {
			e.Errorf("pod without a container is %v", s.State)
		}
		second := p.start("second", idle)
		second.want("cat /proc/sys/kernel/random/boot_id", boot)
		// A name is free again once the container is gone.
		second.stop()
		second.remove()
		p.start("second", "echo again").exited()
	})
}

func TestContainerExitIsToldWithItsCodeAndTimes(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("exit")
		for code, reason := range map[int32]string{0: "Completed", 3: "Error"} {
			s := p.start(fmt.Sprint("exit", code), fmt.Sprintf("echo last words; exit %d", code)).exited()
			if s.ExitCode != code || s.Reason != reason {
				e.Errorf("exit code %d, reason %q; want %d, %q", s.ExitCode, s.Reason, code, reason)
			}
			// containerd takes StartedAt when Start has returned: that may be later.
			if s.CreatedAt <= 0 || s.StartedAt < s.CreatedAt || s.FinishedAt < s.CreatedAt {
				e.Errorf("created %d, started %d, finished %d", s.CreatedAt, s.StartedAt, s.FinishedAt)
			}
		}
	})
}

func TestStopSignalReachesTheContainer(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("signal")
		c := p.start("a", "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 1000 & wait $!; done")
		c.waitOutput("ready")
		ctx, cancel := e.call()
		defer cancel()
		if _, err := e.cri.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: 60}); err != nil {
			e.Fatal(err)
		}
		if s := c.status(); s.ExitCode != 5 {
			e.Errorf("exit code %d, want the trap's 5", s.ExitCode)
		}
		c.waitOutput("bye")
	})
}

// namespaces has the containers of a pod share or not share PIDs.
func namespaces(pid runtime.NamespaceMode) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = pid }
}

// target has a container join another's PID namespace.
func target(c *container) func(*runtime.ContainerConfig) {
	return func(config *runtime.ContainerConfig) {
		config.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET, TargetId: c.id}
	}
}

func TestPIDNamespaceOfThePodIsShared(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("shared", namespaces(runtime.NamespaceMode_POD))
		a := p.start("a", "sleep 4711")
		b := p.start("b", "echo $$; "+idle)
		b.waitOutput("\n")
		if got := strings.TrimSpace(b.output("stdout")); got == "1" {
			e.Error("the container is process 1 of the pod's PID namespace")
		}
		e.eventually("a sibling's process is seen", func(context.Context) error {
			if got := b.sh("ps -o args"); !strings.Contains(got, "sleep 4711") {
				return fmt.Errorf("ps: %q", got)
			}
			return nil
		})
		if x, y := a.sh("readlink /proc/self/ns/pid"), b.sh("readlink /proc/self/ns/pid"); x != y {
			e.Errorf("PID namespaces %s and %s", x, y)
		}
		// A signal passes from one to the other.
		b.sh("kill -9 $(pidof sleep | tr ' ' '\\n' | while read p; do grep -qz 4711 /proc/$p/cmdline && echo $p; done)")
		if s := a.exited(); s.ExitCode != 137 {
			e.Errorf("exit code %d of a container killed by its sibling", s.ExitCode)
		}
		b.running()
	})
}

func TestPIDNamespaceOfAContainerIsPrivate(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("private", namespaces(runtime.NamespaceMode_CONTAINER))
		a := p.start("a", "sleep 4711")
		b := p.start("b", "echo $$; "+idle)
		b.waitOutput("1\n")
		if got := b.sh("ps -o args"); strings.Contains(got, "4711") {
			e.Errorf("a sibling's process is seen: %q", got)
		}
		if x, y := a.sh("readlink /proc/self/ns/pid"), b.sh("readlink /proc/self/ns/pid"); x == y {
			e.Errorf("both have the PID namespace %s", x)
		}
	})
}

// TestPIDNamespaceOfATargetIsJoined is what an ephemeral container of a
// debugger asks for.
func TestPIDNamespaceOfATargetIsJoined(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("target", namespaces(runtime.NamespaceMode_CONTAINER))
		a := p.start("a", "exec sleep 4711")
		b := p.start("debugger", idle, target(a))
		b.want("tr '\\0' ' ' < /proc/1/cmdline", "sleep 4711")
		// One may go without the other, but not the other way round.
		c := p.start("debugger2", idle, target(a))
		c.stop()
		c.remove()
		a.running()
		b.running()
		a.stop()
		if s := b.exited(); s.ExitCode != 137 {
			e.Errorf("exit code %d, want that of a process killed with its PID namespace", s.ExitCode)
		}
	})
}

// TestATargetThatCannotBeToldIsRefused is where husk knows less than runc: the
// namespace's path is the same for all containers of a pod.
func TestATargetThatCannotBeToldIsRefused(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		p := e.run("which", namespaces(runtime.NamespaceMode_CONTAINER))
		a, b := p.start("a", "exec sleep 4711"), p.start("b", "exec sleep 4712")
		c, err := p.tryStart("debugger", idle, target(a))
		for _, part := range []string{"linux.namespaces (pid).path", a.id, b.id, "shareProcessNamespace"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				e.Errorf("start of a container whose target is one of two: %v, want a refusal that says %q", err, part)
			}
		}
		if c != nil {
			c.remove()
		}
		plain := p.start("plain", idle) // without a target it may be had
		plain.stop()
		plain.remove()
		b.stop()
		p.start("debugger", idle, target(a)).want("tr '\\0' ' ' < /proc/1/cmdline", "sleep 4711")
	})
}

func TestKillStaysInsideItsContainerUnderASharedPIDNamespace(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("kill", namespaces(runtime.NamespaceMode_POD))
		a := p.start("a", "sleep 4711 & sleep 4712 & "+idle)
		b := p.start("b", "sleep 4713 & "+idle)
		e.eventually("all run", func(context.Context) error {
			if n := b.sh("ps -o args | grep -c '^sleep 471'"); n != "3" {
				return fmt.Errorf("%s of 3", n)
			}
			return nil
		})
		a.stop() // with all that is in it
		b.running()
		b.want("ps -o args | grep '^sleep 471'", "sleep 4713")
	})
}

func TestIPCIsSharedByThePodAndPrivateToIt(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p, q := e.run("one"), e.run("other")
		a, b, c := p.start("a", idle), p.start("b", idle), q.start("c", idle)
		a.sh("echo shared > /dev/shm/f; : > /dev/mqueue/queue")
		b.want("cat /dev/shm/f; ls /dev/mqueue", "shared\nqueue")
		c.want("ls /dev/shm /dev/mqueue | grep -v :", "")
		if x, y := a.sh("readlink /proc/self/ns/ipc"), b.sh("readlink /proc/self/ns/ipc"); x != y {
			e.Errorf("IPC namespaces %s and %s", x, y)
		}
		// It stays when the container that made it goes.
		a.stop()
		a.remove()
		b.want("cat /dev/shm/f", "shared")
	})
}

func TestSharedMemoryHasItsSizeOnceForThePod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("shm")
		a, b := p.start("a", idle), p.start("b", idle)
		a.want("df -k /dev/shm | tail -n 1 | awk '{print $2}'", "65536")
		a.sh("dd if=/dev/zero of=/dev/shm/half bs=1M count=40 2>/dev/null")
		if r := b.exec("dd if=/dev/zero of=/dev/shm/rest bs=1M count=40"); r.code == 0 {
			e.Errorf("two containers together wrote more than /dev/shm holds: %v", r)
		}
	})
}

func TestUTSNamespaceBelongsToThePod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("uts", privilegedPod)
		a, b := p.start("a", idle, privileged), p.start("b", idle)
		a.want("hostname", "uts")
		a.sh("hostname renamed")
		b.want("hostname", "renamed")
		a.stop()
		a.remove()
		b.want("hostname", "renamed")
		p.start("c", idle).want("hostname", "renamed")
		e.run("uts2").start("d", idle).want("hostname", "uts2")
	})
}

func TestSiblingsOutliveAnExitAndARemoval(t *testing.T) {
	each(t, setup{}, func(e *env) {
		for _, mode := range []runtime.NamespaceMode{runtime.NamespaceMode_CONTAINER, runtime.NamespaceMode_POD} {
			p := e.run("siblings"+strings.ToLower(mode.String()), namespaces(mode))
			a := p.start("a", idle)
			b := p.start("b", "exit 9")
			if s := b.exited(); s.ExitCode != 9 {
				e.Errorf("exit code %d", s.ExitCode)
			}
			b.remove()
			a.running()
			a.want("echo here", "here")
			p.remove()
		}
	})
}

func TestSiblingsOutliveAnOutOfMemory(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("oom")
		a := p.start("a", idle)
		b := p.start("b", "exec dd if=/dev/zero of=/dev/null bs=200M", func(c *runtime.ContainerConfig) {
			c.Linux.Resources.MemoryLimitInBytes = 32 << 20
			c.Linux.Resources.MemorySwapLimitInBytes = 32 << 20
		})
		// The event may come after the exit.
		b.exited()
		e.within(10*time.Second, "the reason is told", func(context.Context) error {
			if s := b.status(); s.ExitCode != 137 || s.Reason != "OOMKilled" {
				return fmt.Errorf("exit code %d, reason %q; want 137, OOMKilled", s.ExitCode, s.Reason)
			}
			return nil
		})
		a.running()
		a.want("echo here", "here")
	})
}

func TestExecProbes(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("probes")
		c := p.start("a", idle)
		for _, code := range []int32{0, 1, 42, 255} {
			if r := c.exec(fmt.Sprintf("echo probe; exit %d", code)); r.code != code || r.stdout != "probe\n" {
				e.Errorf("probe: %v, want exit code %d", r, code)
			}
		}
		if r, err := c.tryExec(10, "/nonexistent"); err == nil {
			e.Errorf("exec of a program that is not there: %v", r)
		}
		began := time.Now()
		_, err := c.tryExec(1, "sh", "-c", "exec sleep 4714")
		if err == nil || !strings.Contains(err.Error(), "timeout") {
			e.Errorf("probe that lasts: %v, want a timeout", err)
		}
		if took := time.Since(began); took > 30*time.Second {
			e.Errorf("the timeout of 1 s took %v", took)
		}
		e.eventually("the probe that lasted is gone", func(context.Context) error {
			if got := c.sh("ps -o args"); strings.Contains(got, "4714") {
				return fmt.Errorf("ps: %q", got)
			}
			return nil
		})
		c.running()
	})
}
