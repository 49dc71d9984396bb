package container

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sharing edits a spec: of the namespaces in types it has none of its own, and
// with path the PID namespace that is there.
func sharing(spec *specs.Spec, path string, types ...specs.LinuxNamespaceType) *specs.Spec {
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return slices.Contains(types, ns.Type)
	})
	if path != "" {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: path})
	}
	return spec
}

// begin creates and starts a container that runs a shell script, and returns
// once that has said something.
func (c *inside) begin(t *testing.T, spec *specs.Spec) *Process {
	t.Helper()
	id := strings.TrimPrefix(spec.Linux.CgroupsPath, c.cgroup+"/")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := c.Create(t.Context(), id, spec, nil, Stdio{Stdout: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	return p
}

// exec runs a script in a container and returns its output.
func (c *inside) exec(t *testing.T, id, script string) string {
	t.Helper()
	w, read := output(t)
	process := &specs.Process{Args: []string{"sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}}
	p, err := c.Exec(t.Context(), id, "e", process, Stdio{Stdout: w, Stderr: w})
	if err != nil {
		t.Fatal(err)
	}
	status := exitOf(t, p)
	out := read()
	if status != 0 {
		t.Errorf("%s: status %d: %s", script, status, out)
	}
	return out
}

func (c *inside) pids(t *testing.T, id string) []int {
	t.Helper()
	pids, err := c.Pids(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

func (c *inside) delete(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := c.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

func running(p *Process) bool {
	select {
	case <-p.Done():
		return false
	default:
		return true
	}
}

func testSharedPID(t *testing.T, c *inside) {
	ctx := t.Context()
	shared := func(id, script string) *specs.Spec {
		return sharing(c.spec(id, false, "sh", "-c", script), c.cfg.SharedPID.Path(), specs.PIDNamespace)
	}
	if _, err := c.Create(ctx, "bad", sharing(c.spec("bad", false, "true"), "/proc/1/ns/pid", specs.PIDNamespace), nil, Stdio{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another PID namespace: %v", err)
	}
	a := c.begin(t, shared("a", "sleep 1001 & echo up; exec sleep 1002"))
	b := c.begin(t, shared("b", "echo up; exec sleep 1003"))
	d := c.begin(t, c.spec("d", false, "sh", "-c", "echo up; exec sleep 1004")) // has its own

	// Those that share see each other and the first process; the other does not.
	const list = "for p in /proc/[0-9]*; do cat $p/cmdline; echo; done"
	for id, want := range map[string][]string{"a": {"1001", "1002", "1003", pauseArg}, "b": {"1001", "1002", "1003", pauseArg}, "d": {"1004"}} {
		seen := c.exec(t, id, list)
		for _, s := range []string{"1001", "1002", "1003", "1004", pauseArg} {
			if slices.Contains(want, s) && !strings.Contains(seen, s) || id == "d" && s != "1004" && strings.Contains(seen, s) {
				t.Errorf("%s sees %q, want %v", id, seen, want)
			}
		}
	}
	c.exec(t, "a", "busybox grep -q pause /proc/1/comm")

	// Signals to all, and lists, stay with their container, and so does crun.
	if pids := c.pids(t, "a"); len(pids) != 2 || !slices.Contains(pids, a.PID()) || slices.Contains(pids, b.PID()) {
		t.Errorf("processes of a: %v; first of a %d, of b %d", pids, a.PID(), b.PID())
	}
	for id, p := range map[string]*Process{"a": a, "b": b} {
		state, err := c.command(c.cfg.Dir+"/log/state").State(ctx, id)
		if err != nil || state.Pid != p.PID() || state.Status != "running" {
			t.Errorf("state of %s: %+v, %v", id, state, err)
		}
	}
	if err := c.Kill(ctx, "a", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if status := exitOf(t, a); status != 137 {
		t.Errorf("status %d", status)
	}
	if err := c.KillRest(ctx, "a"); err != nil {
		t.Error(err)
	}
	if pids := c.pids(t, "a"); len(pids) != 0 {
		t.Errorf("processes %v of a are left", pids)
	}
	c.delete(t, "a")

	// What is left when the first process ends is the container's own only.
	e := c.begin(t, shared("e", "sleep 1005 & echo up; exit 3"))
	if status := exitOf(t, e); status != 3 {
		t.Errorf("status %d", status)
	}
	if pids := c.pids(t, "e"); len(pids) != 1 {
		t.Errorf("processes %v are left of e, want the one in the background", pids)
	}
	if err := c.KillRest(ctx, "e"); err != nil {
		t.Error(err)
	}
	if seen := c.exec(t, "b", list); strings.Contains(seen, "1005") || strings.Contains(seen, "1001") {
		t.Errorf("b sees %q still", seen)
	}
	if zombies := c.exec(t, "b", "busybox grep -ls 'State:.*zombie' /proc/[0-9]*/status; true"); zombies != "" {
		t.Errorf("zombies: %s", zombies)
	}
	c.delete(t, "e")
	if !running(b) || !running(d) {
		t.Fatal("a sibling has ended")
	}
	// As others call it, crun kills one container of the namespace.
	if err := c.command(c.cfg.Dir+"/log/kill").Kill(ctx, "b", 9, &runc.KillOpts{}); err != nil {
		t.Error(err)
	}
	exitOf(t, b)
	c.delete(t, "b", "d")
	for _, name := range []string{"state", "kill"} {
		os.Remove(c.cfg.Dir + "/log/" + name)
	}
}

func testSharedPIDKilled(t *testing.T, c *inside) {
	spec := func(id string) *specs.Spec {
		return sharing(c.spec(id, false, "sh", "-c", "echo up; exec sleep 1000"), c.cfg.SharedPID.Path(), specs.PIDNamespace)
	}
	a := c.begin(t, spec("a"))
	if err := c.cfg.SharedPID.Close(); err != nil {
		t.Fatal(err)
	}
	if status := exitOf(t, a); status != 137 {
		t.Errorf("status %d", status)
	}
	b := c.begin(t, spec("b")) // in a new one
	if !running(b) {
		t.Error("it has ended")
	}
	c.delete(t, "a", "b")
}

func testGuestPID(t *testing.T, c *inside) {
	p := c.begin(t, sharing(c.spec("a", false, "sh", "-c", "sleep 1000 & echo up; exit 4"), "", specs.PIDNamespace))
	if status := exitOf(t, p); status != 4 {
		t.Errorf("status %d", status)
	}
	if err := c.KillRest(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if pids := c.pids(t, "a"); len(pids) != 0 {
		t.Errorf("processes %v are left", pids)
	}
	c.delete(t, "a")
}

func testSharedIPC(t *testing.T, c *inside) {
	const key = 0x4875736b
	segment, err := unix.SysvShmGet(key, 4096, unix.IPC_CREAT|0o600) // the guest's: this process's
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("this machine's kernel has no shared memory segments: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer unix.SysvShmCtl(segment, unix.IPC_RMID, nil)
	if err := unix.Sethostname([]byte("husk-pod")); err != nil {
		t.Fatal(err)
	}
	shm := t.TempDir()
	if err := unix.Mount("shm", shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=65536"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(shm, unix.MNT_DETACH)
	spec := func(id string, share bool) *specs.Spec {
		s := c.spec(id, false, "sh", "-c", "echo up; exec sleep 1000")
		own := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}
		if share {
			sharing(s, "", specs.IPCNamespace, specs.UTSNamespace)
			own = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: shm, Options: []string{"rbind", "nosuid", "noexec", "nodev"}}
		} else {
			s.Hostname = "own-" + id
		}
		s.Mounts = append(s.Mounts, own)
		return s
	}
	for id, share := range map[string]bool{"a": true, "b": true, "own": false} {
		c.begin(t, spec(id, share))
	}
	c.exec(t, "a", "echo hello > /dev/shm/file")
	c.exec(t, "own", "echo other > /dev/shm/own")
	look := fmt.Sprintf("busybox hostname; busybox ls /dev/shm; busybox grep -c '^ *%d ' /proc/sysvipc/shm; true", key)
	for id, want := range map[string]string{"a": "husk-pod\nfile\n1\n", "b": "husk-pod\nfile\n1\n", "own": "own-own\nown\n0\n"} {
		if out := c.exec(t, id, look); out != want {
			t.Errorf("%s sees %q, want %q", id, out, want)
		}
	}
	if out := c.exec(t, "b", "busybox stat -c %a /dev/shm; busybox grep -c ' /dev/shm .*nosuid,nodev,noexec' /proc/mounts"); out != "1777\n1\n" {
		t.Errorf("b's /dev/shm: %q", out)
	}
	c.delete(t, "a", "b", "own")
}
