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
		if got := parseMounts(c.mounts); !slices.Equal(got, c.want) {
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
