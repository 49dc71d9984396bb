package cri

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// killedByOOM wants a container's end to be told as that of one which had too little
// memory, and by events in their order.
func (ev *events) killedByOOM(c *container) {
	ev.e.Helper()
	ev.e.within(time.Minute, "the end by lack of memory is told", func(context.Context) error {
		if s := c.status(); s.State != runtime.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.Reason != "OOMKilled" {
			return fmt.Errorf("container is %v, exit code %d, reason %q", s.State, s.ExitCode, s.Reason)
		}
		return nil
	})
	if ev.e.isHusk() {
		ev.want(c, "oom", "exit")
	} else { // runc's shim hears of them in any order
		ev.want(c, "oom")
		ev.want(c, "exit")
	}
}

// TestOOMOfAContainer is of one above its own limit: its first process, or another.
func TestOOMOfAContainer(t *testing.T) {
	each(t, setup{tasks: true}, func(e *env) {
		ev := e.events()
		p := e.run("oom", asks(0, 384))
		sibling := p.start("sibling", idle, e.hog(), limits(0, 64))
		first := p.start("first", "exec /hog memory 100", e.hog(), limits(0, 32))
		ev.killedByOOM(first)

		// The container goes on without the process that was too large.
		child := p.start("child", "/hog memory 100; echo ended with $?; "+idle, e.hog(), limits(0, 32))
		child.waitOutput("ended with 137\n")
		ev.want(child, "oom")
		child.running()
		child.want("echo here", "here")
		child.terminate()
		if s := child.status(); s.ExitCode != 0 {
			e.Errorf("a container that ended by itself has exit code %d", s.ExitCode)
		}
		ev.want(child, "oom", "exit")

		// Neither is anything of the sibling's.
		sibling.running()
		sibling.want("echo here", "here")
		if got := ev.of(sibling); slices.Contains(got, "oom") {
			e.Errorf("events of the sibling are %v", got)
		}
		p.remove()
		e.settled()
	})
}

// TestOOMOfTheWholeGuest has no container above a limit: the guest has too little.
func TestOOMOfTheWholeGuest(t *testing.T) {
	each(t, setup{husk: true, once: true}, func(e *env) {
		ev := e.events()
		p := e.run("guest")
		sibling := p.start("sibling", idle)
		hog := p.start("hog", "exec /hog memory 0", e.hog())
		ev.killedByOOM(hog)
		sibling.running()
		sibling.want("echo here", "here")
		if got := ev.of(sibling); slices.Contains(got, "oom") {
			e.Errorf("events of the sibling are %v", got)
		}
		// A process that is not the container's first one, nor even of its tree.
		victim := p.start("victim", idle, e.hog())
		if r := victim.exec("/hog memory 0"); r.code != 137 {
			e.Errorf("an exec that took all memory: %v, want exit code 137", r)
		}
		ev.want(victim, "oom")
		victim.running()
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY {
			e.Errorf("pod is %v", s.State)
		}
		p.start("next", "true").exited()
		p.remove()
		e.settled()
	})
}

// TestOOMOfTheMachineOnTheHost has a pod's cgroup on the host be too small for its
// machine, so that the host's kernel kills that; beside it one that was just killed.
func TestOOMOfTheMachineOnTheHost(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		if e.generation != "2.4" && !*longFlag {
			e.Skip("by the task API as with 2.4; -long runs it")
		}
		ev := e.events()
		p := e.run("small", e.podCgroup("small", 320), asks(0, 1024))
		other := e.run("other")
		a := p.start("a", idle)
		hog := p.start("hog", "exec /hog memory 900", e.hog())
		ev.killedByOOM(hog)
		ev.killedByOOM(a)
		e.within(callTimeout, "the pod's end is told", func(context.Context) error {
			if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
				return fmt.Errorf("pod is %v", s.State)
			}
			return nil
		})
		p.remove()

		b := other.start("b", idle)
		e.kill(e.machine(other))
		if s := b.exited(); s.ExitCode != 137 && s.ExitCode != 255 || s.Reason == "OOMKilled" {
			e.Errorf("after a kill of its machine the container has exit code %d, reason %q", s.ExitCode, s.Reason)
		}
		if got := ev.of(b); slices.Contains(got, "oom") {
			e.Errorf("events after a kill are %v", got)
		}
		other.remove()
		e.settled()
	})
}
