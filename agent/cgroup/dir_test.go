package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// mkdirs makes what looks like a cgroup with one below it.
func mkdirs(t *testing.T) Dir {
	dir := filepath.Join(t.TempDir(), "c")
	for name, content := range map[string]string{
		"cgroup.procs": "3\n5\n", "below/cgroup.procs": "7\n", "cgroup.events": "populated 0\nfrozen 0\n",
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Dir(dir)
}

func TestCgroupPids(t *testing.T) {
	pids, err := mkdirs(t).Pids()
	if diff := cmp.Diff([]int{3, 5, 7}, pids); diff != "" || err != nil {
		t.Fatal(diff, err)
	}
}

func TestCgroupThatIsNotThere(t *testing.T) {
	c := Dir(filepath.Join(t.TempDir(), "none"))
	if pids, err := c.Pids(); len(pids) != 0 || err != nil {
		t.Error(pids, err)
	}
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := c.Kill(s); err != nil {
			t.Error(err)
		}
	}
	if err := c.WaitEmpty(time.Minute); err != nil {
		t.Error(err)
	}
	if err := c.Remove(); err != nil {
		t.Error(err)
	}
}

func TestCgroupKillAndRemove(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making a cgroup needs root")
	}
	mount := t.TempDir()
	if err := unix.Mount("cgroup2", mount, "cgroup2", 0, ""); err != nil {
		t.Skip("no cgroup v2 can be mounted: ", err)
	}
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	c := Dir(filepath.Join(mount, "husk-test-"+filepath.Base(filepath.Dir(mount))))
	below := filepath.Join(string(c), "below")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Skip("no cgroup can be made: ", err)
	}
	t.Cleanup(func() { c.Remove() })
	dir, err := os.Open(below)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if pids, err := c.Pids(); len(pids) != 1 || pids[0] != cmd.Process.Pid || err != nil {
		t.Errorf("pids %v, %v", pids, err)
	}
	if err := c.WaitEmpty(time.Millisecond); err == nil {
		t.Error("empty with a process in it")
	}
	if err := c.Kill(syscall.SIGKILL); err != nil {
		t.Error(err)
		cmd.Process.Kill()
	}
	if err := c.WaitEmpty(time.Minute); err != nil {
		t.Error(err)
	}
	<-ended
	if err := c.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(string(c)); !os.IsNotExist(err) {
		t.Errorf("cgroup is left: %v", err)
	}
}

func TestOOMKills(t *testing.T) {
	for events, want := range map[string]uint64{
		"low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n": 2,
		"low 0\n": 0, "": 0, "oom_kill x\n": 0,
	} {
		if got := oomKills([]byte(events)); got != want {
			t.Errorf("%q: %d, want %d", events, got, want)
		}
	}
}

func TestOOMWatch(t *testing.T) {
	c := mkdirs(t)
	file := filepath.Join(string(c), "memory.events")
	write := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("oom_kill 0\n")
	o, err := NewOOMWatch()
	if err != nil {
		t.Fatal(err)
	}
	o.Add("c", c)
	changed := make(chan string, 16)
	done := make(chan error, 1)
	go func() { done <- o.Run(t.Context(), func(id string) { changed <- id }) }()
	write("oom_kill 1\n")
	if id := <-changed; id != "c" {
		t.Errorf("changed %q", id)
	}
	if !o.Take("c") || o.Take("c") || o.Take("other") {
		t.Error("one kill is not told once")
	}
	o.Remove("c")
	write("oom_kill 2\n")
	if o.Take("c") {
		t.Error("removed, and still told of")
	}
	o.inotify.Close()
	<-done
}
