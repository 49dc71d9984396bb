package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestParse(t *testing.T) {
	for path, want := range map[string]string{
		"/kubepods/burstable/pod1/c1": "/kubepods/burstable/pod1/c1",
		"/default/c1":                 "/default/c1",
		"default//c1/":                "/default/c1",
		"/a:b:c/d":                    "/a:b:c/d",
		"a:b":                         "/a:b",
		"kubepods-besteffort-podX_1.slice:cri-containerd:c1": "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX_1.slice/cri-containerd-c1.scope",
		"system.slice:crio:c1":                               "/system.slice/crio-c1.scope",
		":nerdctl:c1":                                        "/system.slice/nerdctl-c1.scope",
		"-.slice:p:c1":                                       "/p-c1.scope",
		"a.slice::c1":                                        "/a.slice/c1.scope",
		"a.slice:p:b.slice":                                  "/a.slice/b.slice",
	} {
		if got, err := Parse(path); got != want || err != nil {
			t.Errorf("Parse(%q) = %q, %v, want %q", path, got, err, want)
		}
	}
	for _, path := range []string{"", "/", "//", "/..", "/a/../b", "/a/..", "../a", "a:b:c", ".slice:p:c", "a--b.slice:p:c", "-a.slice:p:c", "/a\x00b"} {
		if got, err := Parse(path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Parse(%q) = %q, %v, want InvalidArgument", path, got, err)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const head = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n"
	for name, c := range map[string]struct {
		mounts string
		want   []string
	}{
		"none":    {head, nil},
		"unified": {"31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n", []string{"/sys/fs/cgroup"}},
		"version 1": {
			head + "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n33 31 0:30 / /sys/fs/cgroup/systemd rw shared:1 master:2 - cgroup cgroup rw,name=systemd\n",
			[]string{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/systemd"},
		},
		"mounted twice, first from below": {
			"32 31 0:29 /docker/x /a rw - cgroup cgroup rw,cpu\n33 31 0:29 / /b rw - cgroup cgroup rw,cpu\n34 31 0:29 / /c rw - cgroup cgroup rw,cpu\n",
			[]string{"/b"},
		},
		"a space in it": {`32 31 0:29 / /a\040b rw - cgroup2 none rw` + "\n", []string{"/a b"}},
		"garbage":       {"x\n - cgroup\n1 2 3 4 5 6 -\n", nil},
	} {
		var got []string
		for _, h := range parseMounts(c.mounts) {
			got = append(got, h.point)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestProcessInEveryHierarchy(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes cgroups: needs root")
	}
	points, err := roots()
	if err != nil {
		t.Skip(err)
	}
	parent := fmt.Sprintf("/husk-test-%d", os.Getpid())
	path := parent + "/pod/c1"
	t.Cleanup(func() {
		for _, point := range points {
			os.Remove(filepath.Join(point, parent, "pod"))
			os.Remove(filepath.Join(point, parent))
		}
	})
	var recorded []string
	c, err := New(path, func(dirs []string) error {
		for _, dir := range dirs {
			if _, err := os.Lstat(dir); err == nil {
				t.Errorf("%s is there before it is on record", dir)
			}
		}
		recorded = dirs
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(recorded) != len(points) {
		t.Errorf("on record: %q", recorded)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		sleeper.Process.Kill() //nolint:errcheck // it may have ended
		sleeper.Wait()         //nolint:errcheck // likewise
	}()
	if err := c.Add(sleeper.Process.Pid); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", sleeper.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if !strings.HasSuffix(strings.TrimSpace(line), ":"+path) {
			t.Errorf("the process is elsewhere: %s", line)
		}
	}

	// Another finds it there, and leaves it.
	other, err := New(path, func(dirs []string) error { return fmt.Errorf("%q are new", dirs) })
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.Delete(timeout(t, 100*time.Millisecond)); err == nil || !strings.Contains(err.Error(), fmt.Sprint(sleeper.Process.Pid)) {
		t.Errorf("Delete with a process in it: %v", err)
	}
	sleeper.Process.Kill()
	sleeper.Wait()
	for range 2 { // idempotent
		if err := c.Delete(timeout(t, 10*time.Second)); err != nil {
			t.Error(err)
		}
	}
	for _, dir := range recorded {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

// Without a hierarchy that takes directories nothing is left of the others.
func TestNewLeavesNothingOnError(t *testing.T) {
	good, file := t.TempDir(), filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newBelow([]string{good, file}, "/pod/c1", nil); err == nil {
		t.Error("a cgroup below a file")
	}
	if _, err := os.Lstat(filepath.Join(good, "pod/c1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	unwritten := errors.New("the disk is full")
	if _, err := newBelow([]string{good}, "/pod/c1", func([]string) error { return unwritten }); !errors.Is(err, unwritten) {
		t.Errorf("unrecorded: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(good, "pod/c1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("made though it is not on record: %v", err)
	}
}

func TestOfPod(t *testing.T) {
	for _, c := range []struct{ parent, want string }{
		{"", ""},
		{"/kubepods/burstable/podU", "/kubepods/burstable/podU/id"},
		{"/kubepods.slice/kubepods-podU.slice", "kubepods-podU.slice:cri-containerd:id"},
		{"kubepods-podU.slice", "kubepods-podU.slice:cri-containerd:id"},
	} {
		if got := OfPod(c.parent, "id"); got != c.want {
			t.Errorf("OfPod(%q): %q, want %q", c.parent, got, c.want)
		}
	}
}

func TestFindIn(t *testing.T) {
	const cgroups = "4:memory:/m\n3:cpu,cpuacct:/c/d:e\n2:name=systemd:/s\n0::/u/v\n"
	v1 := func(point, root, options string) hierarchy {
		return hierarchy{point: point, root: root, options: strings.Split(options, ",")}
	}
	for _, c := range []struct {
		h    hierarchy
		want string
	}{
		{v1("/g/memory", "/", "rw,memory"), "/g/memory/m"},
		{v1("/g/cpu", "/", "rw,cpu,cpuacct"), "/g/cpu/c/d:e"},
		{v1("/g/cpu", "/c", "rw,cpu,cpuacct"), "/g/cpu/d:e"},
		{v1("/g/cpu", "/c/d:e", "rw,cpu,cpuacct"), "/g/cpu"},
		{v1("/g/systemd", "/", "rw,xattr,name=systemd"), "/g/systemd/s"},
		{hierarchy{point: "/g", root: "/", unified: true, options: []string{"rw", "nsdelegate"}}, "/g/u/v"},
		{v1("/g/cpu", "/other", "rw,cpu,cpuacct"), ""},
		{v1("/g/pids", "/", "rw,pids"), ""},
	} {
		if got, err := c.h.find(cgroups); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%+v: %q, %v, want %q", c.h, got, err, c.want)
		}
	}
}

// A machine's own cgroups, for a test.
func newGroup(t *testing.T, path string) *Cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes cgroups: needs root")
	}
	if _, err := roots(); err != nil {
		t.Skip(err)
	}
	c, err := New(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Delete(context.Background()); err != nil { // it has no process any more
			t.Error(err)
		}
	})
	return c
}

// What is started in a cgroup is in it from its first moment, and its starter never.
func TestStart(t *testing.T) {
	c := newGroup(t, fmt.Sprintf("/husk-test-start-%d", os.Getpid()))
	before, err := Of(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat", "/proc/self/cgroup")
	var out strings.Builder
	cmd.Stdout = &out
	if err := c.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if !strings.HasSuffix(strings.TrimSpace(line), fmt.Sprintf(":/husk-test-start-%d", os.Getpid())) {
			t.Errorf("started elsewhere: %s", line)
		}
	}
	after, err := Of(os.Getpid())
	if err != nil || !slices.Equal(before.dirs, after.dirs) {
		t.Errorf("this process was in %q, and is in %q: %v", before.dirs, after.dirs, err)
	}
	for _, dir := range c.dirs {
		for _, name := range []string{"tasks", "cgroup.procs"} {
			left, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) || len(left) > 0 {
				t.Errorf("%s of %s holds %q: %v", name, dir, left, err)
			}
		}
	}
	if err := c.Start(exec.Command("/nonexistent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a program that is not there: %v", err)
	}
}

// A process goes back to where it came from, or above where that is gone, and what it
// was in is removed.
func TestStay(t *testing.T) {
	base := fmt.Sprintf("/husk-test-stay-%d-", os.Getpid())
	gone := newGroup(t, base+"gone")
	root := &Cgroup{}
	for _, dir := range gone.dirs {
		root.dirs = append(root.dirs, filepath.Dir(dir))
	}
	for name, home := range map[string]*Cgroup{"there": newGroup(t, base+"home"), "gone": gone} {
		if home == gone {
			if err := gone.Delete(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		pod, err := New(base+"pod", nil)
		if err != nil {
			t.Fatal(err)
		}
		sleeper := exec.Command("sleep", "1000")
		if err := pod.Start(sleeper); err != nil {
			t.Fatal(err)
		}
		stay, err := Resume(sleeper.Process.Pid, home.Dirs(), pod.Created())
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(stay.Dirs(), pod.Dirs()) {
			t.Errorf("it is in %q, want %q", stay.Dirs(), pod.Dirs())
		}
		if pids, err := stay.Processes(); !slices.Equal(pids, []int{sleeper.Process.Pid}) {
			t.Errorf("processes %v, %v, want %d", pids, err, sleeper.Process.Pid)
		}
		err = stay.End(timeout(t, 10*time.Second))
		at, atErr := Of(sleeper.Process.Pid)
		want := home
		if home == gone {
			want = root
		}
		if err != nil || atErr != nil || !slices.Equal(at.dirs, want.dirs) {
			t.Errorf("%s: back in %q, %v, want %q: %v", name, at.Dirs(), atErr, want.dirs, err)
		}
		if _, err := stay.Processes(); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the cgroup is left: %v", name, err)
		}
		sleeper.Process.Kill()
		sleeper.Wait()
	}
}

// setLimit writes one of the files that a cgroup may have; what it lacks all of is said.
func setLimit(t *testing.T, c *Cgroup, value string, names ...string) {
	t.Helper()
	for _, name := range names {
		for _, dir := range c.dirs {
			if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
					t.Fatal(err)
				}
				return
			}
		}
	}
	t.Skipf("this host's cgroups have none of %q", names)
}

// The kernel counts a kill where the killed was, also where the limit is above.
func TestOOMKillsByALimitAbove(t *testing.T) {
	above := newGroup(t, fmt.Sprintf("/husk-test-oom-%d", os.Getpid()))
	c := newGroup(t, fmt.Sprintf("/husk-test-oom-%d/pod", os.Getpid()))
	setLimit(t, above, "33554432", "memory.max", "memory.limit_in_bytes")
	if n, err := c.OOMKills(); n != 0 || err != nil {
		t.Fatalf("before: %d, %v", n, err)
	}
	for want, script := range []string{"kill -9 $$", "exec tail /dev/zero"} {
		hog := exec.Command("sh", "-c", script)
		if err := c.Start(hog); err != nil {
			t.Fatal(err)
		}
		if err := hog.Wait(); hog.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("%s: %v", script, err)
		}
		if n, err := c.OOMKills(); n != uint64(want) || err != nil {
			t.Errorf("after %q: %d, %v, want %d", script, n, err, want)
		}
	}
	n, err := above.OOMKills()
	t.Logf("in the cgroup of the limit the kernel counts %d, %v", n, err)
}

func TestPidsMax(t *testing.T) {
	above := newGroup(t, fmt.Sprintf("/husk-test-pids-%d", os.Getpid()))
	c := newGroup(t, fmt.Sprintf("/husk-test-pids-%d/pod", os.Getpid()))
	host, hosts, err := c.PidsMax() // that of where the hierarchy is seen from
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []struct {
		c    *Cgroup
		max  string
		want uint64
	}{{above, "100", 100}, {c, "90", 90}, {c, "200", 100}, {c, "max", 100}, {above, "max", 0}} {
		setLimit(t, s.c, s.max, "pids.max")
		got, limited, err := c.PidsMax()
		if s.want == 0 {
			if got != host || limited != hosts || err != nil {
				t.Errorf("without a limit of ours: %d %v, %v, want %d %v", got, limited, err, host, hosts)
			}
		} else if got != s.want || !limited || err != nil {
			t.Errorf("after %s: %d %v, %v, want %d", s.max, got, limited, err, s.want)
		}
	}
}

func TestUsage(t *testing.T) {
	c := newGroup(t, fmt.Sprintf("/husk-test-usage-%d", os.Getpid()))
	// It holds 32 MiB, says so, and ends with its input.
	cmd := exec.Command("sh", "-c", "x=$(head -c 33554432 /dev/zero | tr '\\0' x); echo; read y")
	out, outErr := cmd.StdoutPipe()
	in, inErr := cmd.StdinPipe()
	if err := errors.Join(outErr, inErr, c.Start(cmd)); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	u, err := c.Usage()
	in.Close()
	if werr := cmd.Wait(); errdefs.IsNotFound(err) {
		t.Skip(err, werr)
	}
	if err != nil || u.MemoryBytes < 32<<20 || u.AnonBytes < 32<<20 || u.AnonBytes > u.MemoryBytes || u.Pids == 0 ||
		u.CPUMicros == 0 || u.CPUMicros > 60e6 || u.UserMicros+u.SystemMicros > u.CPUMicros+1e5 {
		t.Errorf("%+v, %v, want 32 MiB and some time of a process", u, err)
	}
	if err := c.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if u, err := c.Usage(); !errdefs.IsNotFound(err) {
		t.Errorf("of a cgroup that is gone: %+v, %v", u, err)
	}
}

// A cgroup of version 2 hands its controllers on, one by one where it cannot all.
func TestEnable(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"cgroup.controllers": "cpu io memory\n", "cgroup.subtree_control": "io\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := enable(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control")); string(got) != "+cpu +memory" || err != nil {
		t.Errorf("asked for %q, %v", got, err)
	}
}

// Hierarchies without cpusets, and cpusets without what only version 1 has, bind what
// they can.
func TestBindMemory(t *testing.T) {
	c := newGroup(t, fmt.Sprintf("/husk-test-bind-%d", os.Getpid()))
	if err := c.BindMemory("0"); err != nil {
		t.Fatal(err)
	}
	for _, dir := range c.Dirs() {
		bound, err := os.ReadFile(filepath.Join(dir, "cpuset.mems"))
		if err == nil && strings.TrimSpace(string(bound)) != "0" {
			t.Errorf("%s is bound to nodes %q", dir, bound)
		}
	}
}
