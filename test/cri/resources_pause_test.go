package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// counter counts in a file on the host, which tells of its progress when nobody in the
// container can be asked.
const counter = "i=0; while :; do i=$((i+1)); echo $i > /count/n; sleep 0.05; done"

// pause stops the container's processes, resume lets them go on.
func (c *container) pause() error {
	c.e.Helper()
	_, err := c.e.ctr("task", "pause", c.id)
	return err
}

func (c *container) resume() error {
	c.e.Helper()
	_, err := c.e.ctr("task", "resume", c.id)
	return err
}

// must fails the test with an error.
func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// wantState wants a task's state, which containerd keeps a moment behind.
func (c *container) wantState(want string) {
	c.e.Helper()
	c.e.within(10*time.Second, "the task is "+want, func(context.Context) error {
		if got := c.state(); got != want {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
}

// progress waits until a counter's file has changed.
func (e *env) progress(file string) {
	e.Helper()
	before := e.hostRead(file)
	e.within(time.Minute, "progress", func(context.Context) error {
		if e.hostRead(file) == before {
			return errors.New("none")
		}
		return nil
	})
}

// still wants no progress for a while.
func (e *env) still(file string, while time.Duration) {
	e.Helper()
	before := e.hostRead(file)
	time.Sleep(while) // that nothing happens takes time
	if after := e.hostRead(file); after != before {
		e.Errorf("what is paused has gone on from %q to %q", before, after)
	}
}

// TestPauseOfAContainer leaves the others of the pod alone.
func TestPauseOfAContainer(t *testing.T) {
	each(t, setup{tasks: true}, func(e *env) {
		ev := e.events()
		k := e.kubelet("pause")
		counts, others := k.hostPath("a"), k.hostPath("b")
		p := e.run("pause")
		a := p.start("a", counter, with(rw(counts, "/count")))
		b := p.start("b", counter, with(rw(others, "/count")))
		a.eventually("test -s /count/n && echo yes", "yes")
		b.eventually("test -s /count/n && echo yes", "yes")

		e.must(a.pause())
		a.wantState("PAUSED")
		ev.want(a, "paused")
		e.still(counts+"/n", 2*time.Second)
		e.progress(others + "/n")

		if r, err := a.tryExec(30, "true"); err == nil {
			e.Errorf("an exec in a paused container came to %v", r)
		} else {
			e.wantError("exec in a paused container", err, "paused")
		}
		b.want("echo here", "here")
		if e.isHusk() {
			e.wantError("pause what is paused", a.pause(), "paused")
			if u := a.usage(); u.pids == 0 {
				e.Error("a paused container has no process")
			}
		}

		e.must(a.resume())
		a.wantState("RUNNING")
		ev.want(a, "paused", "resumed")
		e.progress(counts + "/n")
		a.want("echo here", "here")
		if e.isHusk() {
			e.wantError("resume what runs", a.resume(), "not paused")
		}

		// What is paused can be killed, and be removed with its pod.
		e.must(a.pause())
		if e.isHusk() { // runc's shim does not send it before the container is thawed
			if _, err := e.ctr("task", "kill", "-s", "SIGKILL", a.id); err != nil {
				e.Errorf("kill what is paused: %v", err)
			}
			if s := a.exited(); s.ExitCode != 137 {
				e.Errorf("exit code %d after a kill of what was paused", s.ExitCode)
			}
			e.must(b.pause())
		} else {
			e.must(a.resume())
		}
		p.remove()
		e.settled()
	})
}

// idleMachine is how much of one CPU a stopped machine may use.
const idleMachine = 0.02

// TestPauseOfASandbox stops the machine.
func TestPauseOfASandbox(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		if e.handler != "husk" {
			e.Skip("a pod by the sandbox API has no task to pause")
		}
		ev := e.events()
		k := e.kubelet("stopped")
		counts := k.hostPath("a")
		p := e.run("stopped")
		a := p.start("a", counter, with(rw(counts, "/count")))
		burner := p.start("burner", "exec /hog cpu user", e.hog())
		burner.ready()
		sandbox := &container{e: e, id: p.id}
		machine := e.machine(p)

		e.must(sandbox.pause())
		sandbox.wantState("PAUSED")
		ev.want(sandbox, "paused")
		const while = 3 * time.Second
		before := e.cpuTime(machine)
		e.still(counts+"/n", while)
		used := e.cpuTime(machine) - before
		e.Logf("the stopped machine has used %v of CPU in %v", used, while)
		if float64(used) > idleMachine*float64(while) {
			e.Errorf("the stopped machine has used %v of CPU in %v", used, while)
		}
		began := time.Now()
		_, err := a.tryExec(30, "true")
		e.wantError("exec in a stopped machine", err, "paused")
		if took := time.Since(began); took > 10*time.Second*patience() {
			e.Errorf("the refusal took %v", took)
		}
		if _, err := p.tryStart("late", "true"); err == nil {
			e.Error("a container was started in a stopped machine")
		} else if !strings.Contains(err.Error(), "paused") {
			e.Errorf("start in a stopped machine: %v", err)
		}

		// Nor does one pod that is stopped keep others from telling of themselves.
		ctx, cancel := e.call()
		defer cancel()
		began = time.Now()
		if _, err := e.cri.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{}); err != nil {
			e.Errorf("stats of all pods beside a stopped machine: %v", err)
		}
		if took := time.Since(began); took > statsLimit*patience() {
			e.Errorf("stats of all pods took %v", took)
		}

		e.must(sandbox.resume())
		sandbox.wantState("RUNNING")
		ev.want(sandbox, "paused", "resumed")
		e.progress(counts + "/n")
		a.want("echo here", "here")
		// The guest's clock is set: it stood while the host's went on.
		if skew := time.Since(time.Unix(int64(a.number("date +%s")), 0)); skew.Abs() > 3*time.Second*patience() {
			e.Errorf("the guest's clock is %v behind after a pause", skew)
		}
		if s := a.status(); s.State != runtime.ContainerState_CONTAINER_RUNNING {
			e.Errorf("the container is %v", s.State)
		}
		if got := ev.of(a); slices.Contains(got, "exit") {
			e.Errorf("events of the container are %v", got)
		}

		e.must(sandbox.pause())
		began = time.Now()
		p.remove()
		e.settled()
		e.Logf("a stopped pod was removed in %v", time.Since(began))
	})
}
