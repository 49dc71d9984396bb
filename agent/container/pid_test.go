package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent/reap"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func testTargetPID(t *testing.T, c *inside) {
	ctx := t.Context()
	joining := func(id, target, script string) *specs.Spec {
		return sharing(c.spec(id, false, "sh", "-c", script), agentv1.ContainerPID(target), specs.PIDNamespace)
	}
	target := c.begin(t, c.spec("target", false, "sh", "-c", "echo up; exec sleep 2001"))
	other := c.begin(t, c.spec("other", false, "sh", "-c", "echo up; exec sleep 2002"))
	debugger := c.begin(t, joining("debugger", "target", "echo up; exec sleep 2003"))
	second := c.begin(t, joining("second", "debugger", "sleep 2005 & echo up; exec sleep 2004")) // whose is the target's
	if open := openNamespaces(t); len(open) != 0 {
		t.Errorf("namespaces %v are still open", open)
	}

	// All see the target as the namespace's first process, and each other.
	for _, id := range []string{"debugger", "second", "target"} {
		if first := c.exec(t, id, "cat /proc/1/cmdline"); first != "sleep\x002001\x00" {
			t.Errorf("the first process that %s sees: %q", id, first)
		}
		seen := c.exec(t, id, "cat /proc/[0-9]*/cmdline")
		for _, s := range []string{"2001", "2003", "2004", "2005"} {
			if !strings.Contains(seen, s) {
				t.Errorf("%s sees %q, not %s", id, seen, s)
			}
		}
		if strings.Contains(seen, "2002") {
			t.Errorf("%s sees a process of another namespace: %q", id, seen)
		}
	}

	// One that joined ends alone, with what it left.
	if err := c.Kill(ctx, "debugger", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := exitOf(t, debugger); status != 137 {
		t.Errorf("status %d", status)
	}
	c.delete(t, "debugger")
	if !running(target) || !running(second) || !running(other) {
		t.Fatal("a sibling has ended")
	}

	// The target's end is that of all in its namespace.
	if err := target.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*Process{target, second} {
		if status := exitOf(t, p); status != 137 {
			t.Errorf("status %d", status)
		}
	}
	if pids := c.pids(t, "second"); len(pids) != 0 {
		t.Errorf("processes %v are left in a namespace that has ended", pids)
	}
	c.delete(t, "second")

	// Neither one that has ended nor one that is not there can be joined.
	refused := func(what, id string) {
		t.Helper()
		_, err := c.Create(ctx, "late", joining("late", id, "true"), nil, Stdio{})
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), fmt.Sprintf("PID namespace of container %q", id)) || strings.Contains(err.Error(), "\n") {
			t.Errorf("PID namespace of %s: %v", what, err)
		}
		if _, err := os.Stat(c.bundle("late")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("PID namespace of %s: something of the container is left: %v", what, err)
		}
	}
	refused("one that has ended", "target")
	c.delete(t, "target")
	refused("one that is deleted", "target")
	refused("the container itself", "late")

	// One that is created has a namespace already.
	if _, err := c.Create(ctx, "created", c.spec("created", false, "sleep", "2006"), nil, Stdio{}); err != nil {
		t.Fatal(err)
	}
	c.begin(t, joining("early", "created", "echo up; exec sleep 2007"))
	if err := c.Start(ctx, "created"); err != nil {
		t.Fatal(err)
	}
	if pid := c.exec(t, "created", "busybox pidof busybox; busybox grep -l 2007 /proc/[0-9]*/cmdline"); !strings.Contains(pid, "/proc/") {
		t.Errorf("the container does not see the one that joined it: %q", pid)
	}
	c.delete(t, "early", "created", "other")
}

// TestTheEndOfATargetExplainsAFailure is of a target that ends after it was found.
func TestTheEndOfATargetExplainsAFailure(t *testing.T) {
	table := reap.New()
	cmd := exec.Command("sleep", "1000")
	init, err := table.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	c := &Crun{inits: map[string]*reap.Process{"a": init}}
	j, err := c.openPID("a")
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	broken := errors.New("clone: cannot allocate memory")
	if err := j.explain(broken); err != broken {
		t.Errorf("while the target lives: %v", err)
	}
	if err := init.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-init.Done()
	if err := j.explain(broken); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("after its end: %v", err)
	}
	if err := j.explain(nil); err != nil {
		t.Errorf("of no failure: %v", err)
	}
	if err := (joinedPID{}).explain(broken); err != broken {
		t.Errorf("of a container that joins none: %v", err)
	}
}

// openNamespaces lists the PID namespaces that this process has open.
func openNamespaces(t *testing.T) []string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "pid:[") {
			open = append(open, to)
		}
	}
	return open
}
