package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/cgroup"
	"github.com/husk-containers/husk/agent/pause"
	"github.com/husk-containers/husk/agent/reap"
)

// crunBinary finds a crun: the guest's, or the system's.
func crunBinary() string {
	if built, err := filepath.Abs("../../build/guest/crun"); err == nil {
		if _, err := os.Stat(built); err == nil {
			return built
		}
	}
	found, _ := exec.LookPath("crun")
	return found
}

const (
	insideEnv = "HUSK_TEST_CRUN_INSIDE"
	pauseArg  = "pause"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == pauseArg {
		if err := pause.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestCrun runs TestCrunInside in a process of its own, where mounts and IPC are
// private and the cgroups are as in a guest.
func TestCrun(t *testing.T) {
	switch {
	case os.Getenv(insideEnv) != "":
		t.Skip("already inside")
	case os.Geteuid() != 0:
		t.Skip("crun needs root")
	case crunBinary() == "":
		t.Skip("no crun: build the guest image, or install the package crun")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip("no /bin/busybox for a root file system: install the package busybox-static")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCrunInside$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Skipf("%s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// inside is a Crun, and what the tests below need of it.
type inside struct {
	*Crun
	rootfs, cgroup string
}

func newInside(t *testing.T) *inside {
	if os.Getenv(insideEnv) == "" {
		t.Skip("run by TestCrun")
	}
	if err := unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH); err != nil {
		t.Skip("unmount cgroups: ", err)
	}
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
		t.Skip("mount cgroup v2: ", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	rootfs := t.TempDir()
	for _, dir := range []string{"bin", "proc", "dev"} {
		if err := os.Mkdir(filepath.Join(rootfs, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"busybox": busybox, "plain": nil} {
		mode := os.FileMode(0o755)
		if content == nil {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(rootfs, "bin", name), content, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sh", "sleep", "cat", "stty", "true"} {
		if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	table := reap.New()
	ctx, cancel := context.WithCancel(context.Background())
	collected := make(chan struct{})
	go func() { table.Collect(ctx); close(collected) }()
	name := fmt.Sprint("/husk-test-", os.Getpid())
	shared := pause.New(filepath.Join(t.TempDir(), "pid"), []string{"/proc/self/exe", pauseArg}, table)
	c, err := NewCrun(CrunConfig{Command: crunBinary(), Dir: t.TempDir(), Cgroup: "/sys/fs/cgroup" + name, SharedPID: shared}, table)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := shared.Close(); err != nil {
			t.Error(err)
		}
		cancel()
		<-collected
		if err := cgroup.Dir(c.cfg.Cgroup).Remove(); err != nil {
			t.Error(err)
		}
	})
	return &inside{c, rootfs, name}
}

func (c *inside) spec(id string, terminal bool, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: c.rootfs},
		Process: &specs.Process{Terminal: terminal, Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: c.cgroup + "/" + id,
			Namespaces:  []specs.LinuxNamespace{{Type: "pid"}, {Type: "mount"}, {Type: "ipc"}, {Type: "uts"}},
		},
	}
}

// output returns a pipe for a process's output, and what comes out of it once
// the test has closed w.
func output(t *testing.T) (w *os.File, read func() string) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	return w, func() string {
		w.Close()
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		return string(b)
	}
}

func exitOf(t *testing.T, p *Process) int {
	t.Helper()
	select {
	case <-p.Done():
		return p.Exit().Status
	case <-time.After(time.Minute):
		t.Fatal("the process does not end")
		return 0
	}
}

// TestCrunInside is one test for there is one Crun in a program.
func TestCrunInside(t *testing.T) {
	c := newInside(t)
	ctx := t.Context()

	t.Run("run", func(t *testing.T) {
		for range 2 { // the id is free again
			w, read := output(t)
			p, err := c.Create(ctx, "run", c.spec("run", false, "sh", "-c", "echo out; exit 3"), nil, Stdio{Stdout: w})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Create(ctx, "run", c.spec("run", false, "true"), nil, Stdio{}); !errdefs.IsAlreadyExists(err) {
				t.Errorf("second create: %v", err)
			}
			if err := c.Start(ctx, "run"); err != nil {
				t.Fatal(err)
			}
			if status := exitOf(t, p); status != 3 {
				t.Errorf("status %d", status)
			}
			if out := read(); out != "out\n" {
				t.Errorf("output %q", out)
			}
			for range 2 { // idempotent
				if err := c.Delete(ctx, "run"); err != nil {
					t.Fatal(err)
				}
			}
		}
	})

	t.Run("refusals", func(t *testing.T) {
		for _, tc := range []struct {
			edit  func(*specs.Spec)
			class error
			want  string
		}{
			{func(s *specs.Spec) { s.Process.Args[0] = "nosuch" }, errdefs.ErrNotFound, `"nosuch": executable file not found in $PATH`},
			{func(s *specs.Spec) { s.Process.Args[0] = "/bin/nosuch" }, errdefs.ErrNotFound, `"/bin/nosuch": no such file`},
			{func(s *specs.Spec) { s.Process.Args[0] = "/bin/plain" }, errdefs.ErrPermissionDenied, `"/bin/plain": not executable`},
			{func(s *specs.Spec) { s.Process.Cwd = "/bin/sh" }, errdefs.ErrInvalidArgument, `working directory "/bin/sh"`},
			{func(s *specs.Spec) { s.Root.Path += "/none" }, errdefs.ErrNotFound, "root file system"},
		} {
			spec := c.spec("bad", false, "true")
			tc.edit(spec)
			w, read := output(t)
			_, err := c.Create(ctx, "bad", spec, nil, Stdio{Stderr: w})
			if !errors.Is(err, tc.class) || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %v with %q", err, tc.class, tc.want)
			}
			read()
		}
		if err := c.Start(ctx, "bad"); !errdefs.IsNotFound(err) {
			t.Errorf("start of what is not there: %v", err)
		}
	})

	t.Run("exec and kill", func(t *testing.T) {
		init, err := c.Create(ctx, "c", c.spec("c", false, "sleep", "1000"), nil, Stdio{})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(ctx, "c"); err != nil {
			t.Fatal(err)
		}
		w, read := output(t)
		p, err := c.Exec(ctx, "c", "e", &specs.Process{Args: []string{"sh", "-c", "echo $X; exit 4"}, Cwd: "/", Env: []string{"PATH=/bin", "X=y"}}, Stdio{Stdout: w})
		if err != nil {
			t.Fatal(err)
		}
		if status := exitOf(t, p); status != 4 {
			t.Errorf("status %d", status)
		}
		if out := read(); out != "y\n" {
			t.Errorf("output %q", out)
		}
		if pids, err := c.Pids(ctx, "c"); len(pids) != 1 || err != nil || pids[0] != init.PID() {
			t.Errorf("pids %v, %v", pids, err)
		}
		// What crun leaves of an exec that fails may be listed for a moment.
		_, err = c.Exec(ctx, "c", "e", &specs.Process{Args: []string{"true"}, Cwd: "/nosuch"}, Stdio{})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("exec in no directory: %v", err)
		}
		if err := c.Kill(ctx, "c", syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if status := exitOf(t, init); status != 137 {
			t.Errorf("status %d", status)
		}
		if err := c.Delete(ctx, "c"); err != nil {
			t.Error(err)
		}
	})

	t.Run("terminal", func(t *testing.T) {
		p, err := c.Create(ctx, "tty", c.spec("tty", true, "sh", "-c", "stty size; exit 5"), nil, Stdio{Terminal: true, Columns: 100, Rows: 30})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Console.Close()
		if err := c.Start(ctx, "tty"); err != nil {
			t.Fatal(err)
		}
		if status := exitOf(t, p); status != 5 {
			t.Errorf("status %d", status)
		}
		b := make([]byte, 64)
		if n, err := p.Console.Read(b); string(b[:n]) != "30 100\r\n" {
			t.Errorf("output %q, %v", b[:n], err)
		}
		if err := c.Delete(ctx, "tty"); err != nil {
			t.Error(err)
		}
	})

	t.Run("delete while it runs", func(t *testing.T) {
		p, err := c.Create(ctx, "d", c.spec("d", false, "sleep", "1000"), nil, Stdio{})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Delete(ctx, "d"); err != nil {
			t.Error(err)
		}
		if status := exitOf(t, p); status != 137 {
			t.Errorf("status %d", status)
		}
	})

	t.Run("shared PID namespace", func(t *testing.T) { testSharedPID(t, c) })
	t.Run("PID namespace that is killed", func(t *testing.T) { testSharedPIDKilled(t, c) })
	t.Run("PID namespace of a container", func(t *testing.T) { testTargetPID(t, c) })
	t.Run("the guest's PID namespace", func(t *testing.T) { testGuestPID(t, c) })
	t.Run("propagation", func(t *testing.T) { testPropagation(t, c) })
	t.Run("shared IPC and UTS", func(t *testing.T) { testSharedIPC(t, c) })

	for _, dir := range []string{"containers", "crun", "log"} {
		left, err := os.ReadDir(filepath.Join(c.cfg.Dir, dir))
		if err != nil || len(left) != 0 {
			t.Errorf("%s: %v is left, %v", dir, left, err)
		}
	}
	if dirs, err := filepath.Glob(c.cfg.Cgroup + "/*/"); len(dirs) != 0 || err != nil {
		t.Errorf("cgroups %v are left, %v", dirs, err)
	}
}
