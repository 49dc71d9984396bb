package e2e

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// deathLimit is how soon the death of a part of a pod is known to all who wait.
const deathLimit = 2 * time.Second

// process waits for a process of the daemon's whose name begins with prefix. It
// asks again and again: the kernel tells nobody but a parent of a process.
func (e *env) process(prefix string) daemon.Process {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		list, err := e.d.Processes()
		if err != nil {
			e.Fatal(err)
		}
		for _, p := range list {
			if strings.HasPrefix(p.Name, prefix) {
				tick.Stop()
				return p
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			e.Fatalf("no process %s in %v", prefix, commandTimeout)
		}
	}
}

// kill ends a process the hard way, and waits for its end.
func (e *env) kill(p daemon.Process) {
	e.Helper()
	if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
		e.Fatalf("kill %v: %v", p, err)
	}
	if err := daemon.WaitExit(e.Context(), p.PID); err != nil {
		e.Fatal(err)
	}
}

// endsSoon wants a command to end by itself before the limit.
func (e *env) endsSoon(c *command) result {
	e.Helper()
	began := time.Now()
	r := c.wait()
	if took := time.Since(began); took > deathLimit {
		e.Errorf("the end was known after %v, want at most %v", took, deathLimit)
	}
	return r
}

func TestHelperKilledWhileBooting(t *testing.T) {
	for _, name := range []string{"qemu-system", "virtiofsd"} {
		t.Run(name, func(t *testing.T) {
			eachHusk(t, func(e *env) {
				e.configure(daemon.Settings{"guest": {"initrd": e.silentGuest()}}) // so that the boot lasts
				c := e.startSh("boot", "echo never")
				e.process("qemu-system") // virtiofsd was started before
				e.kill(e.process(name))
				e.oneClearError(e.endsSoon(c), name[:4], "killed")
			})
		})
	}
}

func TestHelperKilledWhileRunning(t *testing.T) {
	for _, name := range []string{"qemu-system", "virtiofsd"} {
		t.Run(name, func(t *testing.T) {
			eachHusk(t, func(e *env) {
				c := e.startSh("run", "echo ready; sleep 1000")
				c.expect("ready")
				e.kill(e.process(name))
				if r := e.endsSoon(c); r.code != 137 && r.code != 255 {
					e.Errorf("%v, want exit code 137 or 255", r)
				}
			})
		})
	}
}

func TestShimKilled(t *testing.T) {
	// runc's shim leaves its socket behind.
	eachHusk(t, func(e *env) {
		c := e.startSh("run", "echo ready; sleep 1000")
		c.expect("ready")
		e.kill(e.process("containerd-shim"))
		if r := c.wait(); r.code == 0 {
			e.Errorf("%v, want a failure", r)
		}
	})
}

func TestShimKilledWhileBooting(t *testing.T) {
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"guest": {"initrd": e.silentGuest()}})
		c := e.startSh("boot", "echo never")
		e.process("qemu-system")
		e.kill(e.process("containerd-shim"))
		if r := c.wait(); r.code == 0 {
			e.Errorf("%v, want a failure", r)
		}
	})
}

func TestContainerdStartsAgain(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("run", "echo before > /tmp/f; sleep 1000")
		pid := e.taskPID(id)
		if err := e.d.Stop(e.Context()); err != nil {
			e.Fatal(err)
		}
		if err := e.d.Resume(e.Context()); err != nil {
			e.Fatal(err)
		}
		if got := e.taskPID(id); got != pid {
			e.Errorf("task pid %d after the restart, %d before", got, pid)
		}
		if r := e.exec(id, "after", "cat", "/tmp/f"); r.stdout != "before\n" || r.code != 0 {
			e.Errorf("exec after the restart: %v", r)
		}
		events := e.listen()
		e.must("task", "kill", "--signal", "SIGKILL", id)
		events.expect("/tasks/exit")
		events.end()
		e.must("task", "rm", id)
	})
}
