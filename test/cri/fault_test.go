package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// deathLimit is how soon the death of a part of a pod is known.
const deathLimit = 2 * time.Second

// kill ends a process the hard way, and waits for its end.
func (e *env) kill(p daemon.Process) {
	e.Helper()
	if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
		e.Fatalf("kill %v: %v", p, err)
	}
	ctx, cancel := e.call()
	defer cancel()
	if err := daemon.WaitExit(ctx, p.PID); err != nil {
		e.Fatal(err)
	}
}

// refused wants RunPodSandbox to fail with one line that holds the words, and
// to leave nothing.
func (e *env) refused(config *runtime.PodSandboxConfig, words ...string) {
	e.Helper()
	p, err := e.tryRun(config)
	if err == nil {
		e.Fatalf("pod %s runs, want an error with %q", p.config.Metadata.Name, words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			e.Errorf("no %q in the error: %v", w, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		e.Errorf("the error is not one line: %v", err)
	}
	e.settled()
}

func TestMemberThatCannotStartLeavesThePodRunning(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("pod")
		a := p.start("a", idle)
		bad, err := p.tryStart("bad", "", func(c *runtime.ContainerConfig) { c.Command = []string{"/nonexistent"} })
		if err == nil || !strings.Contains(err.Error(), "nonexistent") {
			e.Errorf("a program that is not there: %v", err)
		}
		if s := bad.status(); s.State != runtime.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 || s.Message == "" {
			e.Errorf("its state is %v, %d, %q", s.State, s.ExitCode, s.Message)
		}
		bad.remove()
		_, err = p.tryStart("worse", idle, func(c *runtime.ContainerConfig) { c.WorkingDir = "/etc/passwd" })
		if err == nil {
			e.Error("a working directory that is a file was taken")
		}
		a.running()
		a.want("echo here", "here")
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY {
			e.Errorf("pod is %v", s.State)
		}
		p.start("good", "echo good").exited()
	})
}

func TestNetworkNamespaceDeletedUnderARunningPod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("deleted")
		a := p.start("a", idle)
		path := p.netns()
		if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)); err != nil {
			e.Fatal(err)
		}
		a.running()
		a.want("echo here", "here")
		p.remove()
		e.settled()
		// The node can go on.
		e.run("next").start("b", idle).running()
	})
}

func TestInterfaceDeletedUnderARunningPod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("cut")
		a := p.start("a", idle)
		e.in(p.netns(), "ip link del eth0")
		a.soon("ls /sys/class/net | tr '\\n' ' '", "lo")
		a.running()
		p.remove()
		e.settled()
	})
}

// TestDuplicateMACIsAnError: the guest could not tell the two apart.
func TestDuplicateMACIsAnError(t *testing.T) {
	const mac = "02:00:00:00:00:42"
	same := script("ip link set eth0 address " + mac + "; ! ip link show dev eth1 2>/dev/null || ip link set eth1 address " + mac)
	networks := []string{
		bridge("cni0", 1400, subnet4),
		chain("second", map[string]any{
			"type": "bridge", "bridge": "cni1", "isGateway": true,
			"ipam": map[string]any{"type": "host-local", "dataDir": "{dir}/addresses", "ranges": []any{[]any{map[string]any{"subnet": "10.89.0.0/24"}}}},
		}, same),
	}
	each(t, setup{networks: networks, husk: true}, func(e *env) {
		e.refused(e.podConfig("same"), "eth0", "eth1", mac)
	})
}

func TestHostsNetworkRefusedByConfiguration(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		e.configure(daemon.Settings{"network": {"host_network": "refuse"}})
		e.refused(e.podConfig("refused", hostNetwork), "host_network")
		e.run("other").start("a", idle).running() // is not concerned
	})
}

func (e *env) configure(over daemon.Settings) {
	e.Helper()
	if err := e.d.Configure(over); err != nil {
		e.Fatal(err)
	}
}

func TestHelperKilledEndsAllContainersWithAReason(t *testing.T) {
	for _, name := range []string{"qemu-system", "virtiofsd", "passt"} {
		t.Run(name, func(t *testing.T) {
			each(t, setup{husk: true}, func(e *env) {
				var edits []func(*runtime.PodSandboxConfig)
				if name == "passt" {
					e.world()
					edits = append(edits, hostNetwork)
				}
				p, other := e.run("killed", edits...), e.run("other")
				a, b, c := p.start("a", idle), p.start("b", idle), other.start("c", idle)
				e.kill(e.processOf(p, name))
				e.wantEnd(deathLimit, p, a, b)
				if log := e.d.Log(400); !strings.Contains(log, name[:4]) || !strings.Contains(log, "killed") {
					e.Errorf("the log does not say that %s was killed", name)
				}
				c.running()
				p.remove()
				other.remove()
				e.settled()
			})
		})
	}
}

// processOf is a process of a pod, by the beginning of its name.
func (e *env) processOf(p *pod, name string) daemon.Process {
	e.Helper()
	list := e.processes(name)
	for _, process := range list {
		if e.isOf(process, p) {
			return process
		}
	}
	e.Fatalf("no process %s of pod %s among %v", name, p.config.Metadata.Name, list)
	return daemon.Process{}
}

// wantEnd wants the death of a part of a pod told of all of its containers, with a
// reason, and of the pod, each within the limit.
func (e *env) wantEnd(limit time.Duration, p *pod, members ...*container) {
	e.Helper()
	for _, member := range members {
		e.within(limit, "the end of the containers is told", func(context.Context) error {
			if s := member.status(); s.State != runtime.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 || s.Reason == "" {
				return fmt.Errorf("container is %v, exit code %d, reason %q", s.State, s.ExitCode, s.Reason)
			}
			return nil
		})
	}
	e.within(limit, "the pod's end is told", func(context.Context) error {
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("pod is %v", s.State)
		}
		return nil
	})
}

// isOf is whether a process belongs to a pod: its shim, or the first of the
// processes above it that is one, names the pod.
func (e *env) isOf(process daemon.Process, p *pod) bool {
	e.Helper()
	above := map[int]daemon.Process{}
	for _, q := range e.processes("") {
		above[q.PID] = q
	}
	for q, ok := process, true; ok; q, ok = above[q.PPID] {
		if strings.Contains(strings.Join(q.Args, " "), p.id) {
			return true
		}
	}
	return false
}

func TestShimKilledLeavesNothing(t *testing.T) {
	// runc's shim leaves its socket behind.
	each(t, setup{husk: true}, func(e *env) {
		p := e.run("orphan")
		a := p.start("a", idle)
		e.kill(e.processes("containerd-shim")[0])
		if s := a.exited(); s.ExitCode == 0 {
			e.Errorf("exit code %d", s.ExitCode)
		}
		p.remove()
		e.settled()
	})
}

// restart kills containerd and starts it again.
func (e *env) restart() {
	e.Helper()
	ctx, cancel := e.call()
	defer cancel()
	if err := errors.Join(e.d.Kill(ctx), e.d.Resume(ctx)); err != nil {
		e.Fatal(err)
	}
	e.ready()
}

func TestContainerdKilledUnderARunningPod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("kept")
		a := p.start("a", idle)
		address := p.ip4()
		e.restart()
		a.running()
		a.want("echo here", "here")
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY || s.GetNetwork().GetIp() != address {
			e.Errorf("pod is %v with address %s, was ready with %s", s.State, s.GetNetwork().GetIp(), address)
		}
		p.start("b", idle).running()
		p.remove()
		e.settled()
	})
}

// TestContainerdKilledWhileItRunsAPodLeaksNothing kills it at the moments that
// differ: when the shim is there, when the machine is, and when it boots. (A shim
// of runc's that has no task yet stays behind then, and containerd forgets it.)
func TestContainerdKilledWhileItRunsAPodLeaksNothing(t *testing.T) {
	moments := []struct {
		name, process string
		delay         time.Duration
	}{
		{"the shim starts", "containerd-shim", 0},
		{"the machine starts", "qemu-system", 0},
		{"the machine boots", "qemu-system", 1500 * time.Millisecond},
	}
	for _, m := range moments {
		t.Run(m.name, func(t *testing.T) {
			each(t, setup{husk: true}, func(e *env) {
				var wait sync.WaitGroup
				wait.Go(func() { e.tryRun(e.podConfig("retried")) }) // whose end is that of the connection
				e.eventually("there is "+m.process, func(context.Context) error {
					if len(e.processes(m.process)) == 0 {
						return errors.New("not yet")
					}
					return nil
				})
				time.Sleep(m.delay) // what happens inside the guest tells nobody out here
				e.restart()
				wait.Wait()
				// A kubelet finds a pod that is not ready, or none, and asks for another.
				if err := e.removeAll(); err != nil {
					e.Fatal(err)
				}
				e.settled()
				p := e.run("retried")
				p.start("a", idle).running()
				if list := e.processes("qemu-system"); len(list) != 1 {
					e.Errorf("%d machines for one pod: %v", len(list), list)
				}
				p.remove()
				e.settled()
			})
		})
	}
}

// shimGrowth is how much more memory a long-lived pod's shim may hold after all
// the others have come and gone.
const shimGrowth = 8 << 20

func TestFiftyPodsInFourStreamsLeaveNothing(t *testing.T) {
	if !*longFlag {
		t.Skip("takes minutes; -long runs it")
	}
	const pods, streams = 50, 4
	each(t, setup{}, func(e *env) {
		witness := e.run("witness")
		c := witness.start("a", idle)
		shim := e.processes("containerd-shim")[0]
		before := e.residentBytes(shim)
		names := make(chan string)
		var wait sync.WaitGroup
		for range streams {
			wait.Go(func() {
				for name := range names {
					if err := e.live(name); err != nil {
						e.Errorf("pod %s: %v", name, err)
					}
				}
			})
		}
		for i := range pods {
			names <- fmt.Sprint("pod", i)
			c.want("echo here", "here")
		}
		close(names)
		wait.Wait()
		if after := e.residentBytes(shim); after > before+shimGrowth {
			e.Errorf("the shim's memory grew from %d to %d bytes", before, after)
		}
		c.running()
		witness.remove()
		e.settled()
	})
}

// live has a pod do a little and removes it.
func (e *env) live(name string) error {
	p, err := e.tryRun(e.podConfig(name))
	if err != nil {
		return err
	}
	c, err := p.tryStart("a", idle)
	if err != nil {
		return err
	}
	r, err := c.tryExec(0, "echo", name)
	if err != nil {
		return err
	}
	if r.stdout != name+"\n" {
		return fmt.Errorf("exec: %v", r)
	}
	ctx, cancel := e.call()
	defer cancel()
	if _, err := e.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return err
	}
	_, err = e.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (e *env) residentBytes(p daemon.Process) int {
	e.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.PID))
	if err != nil {
		e.Fatal(err)
	}
	var size, resident int
	if _, err := fmt.Sscan(string(data), &size, &resident); err != nil {
		e.Fatal(err)
	}
	return resident * os.Getpagesize()
}
