package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/hostns"
)

// A host is a directory whose mounts propagate as the shim's do, with a sandbox's
// private directory and the guest's view of it.
type host struct {
	*testing.T
	dir, private, share string
}

func newHost(t *testing.T) host {
	t.Helper()
	h := host{T: t, dir: t.TempDir()}
	h.private, h.share = filepath.Join(h.dir, "private"), filepath.Join(h.dir, "share")
	h.must(unix.Mount(h.dir, h.dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { h.must(mount.UnmountRecursive(h.dir, unix.MNT_DETACH)) })
	h.must(unix.Mount("", h.dir, "", unix.MS_SHARED, ""))
	h.must(Expose(h.private, h.share))
	return h
}

func (h host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// source makes a directory of the host with a file "f", outside of the sandbox's.
func (h host) source() string {
	h.Helper()
	dir := h.TempDir()
	h.must(os.WriteFile(filepath.Join(dir, "f"), []byte("precious"), 0o600))
	return dir
}

// tmpfs mounts one with a file "f" at dir.
func (h host) tmpfs(dir string) {
	h.Helper()
	h.must(os.MkdirAll(dir, 0o700))
	h.must(unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	h.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) }) //nolint:errcheck // the test may have
	h.must(os.WriteFile(filepath.Join(dir, "f"), []byte("precious"), 0o600))
}

func (h host) newShare() *Share {
	h.Helper()
	s, err := New(filepath.Join(h.private, "c"), "/bundle", Here{}.Clone)
	h.must(err)
	return s
}

// seen is a path below the container's directory as the guest has it.
func (h host) seen(path ...string) string {
	return filepath.Join(append([]string{h.share, "c"}, path...)...)
}

func write(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }

func TestTheGuestCannotChangeTheNamesThatTheHostResolves(t *testing.T) {
	h := newHost(t)
	s := h.newShare()
	src := h.source()
	h.must(s.Rootfs(nil, src))
	elsewhere := h.source()
	for what, err := range map[string]error{
		"make a container":        os.Mkdir(filepath.Join(h.share, "d"), 0o700),
		"make a mount":            os.Mkdir(h.seen("x"), 0o700),
		"make a symlink":          os.Symlink(elsewhere, h.seen("x")),
		"write a file":            write(h.seen("x")),
		"remove the container":    os.Remove(h.seen()),
		"move the container away": os.Rename(h.seen(), filepath.Join(h.share, "d")),
		"change the mode":         os.Chmod(h.seen(), 0o777),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("the guest could %s: %v, want EROFS", what, err)
		}
	}
	// A mount point is busy besides, whoever tries.
	if err := os.Rename(h.seen("rootfs"), h.seen("rootfsx")); err == nil {
		t.Error("the guest could move the rootfs")
	}
	h.must(write(h.seen("rootfs", "new"))) // what is mounted below is as writable as it is
	h.must(s.Close())
}

func TestAttachedTrees(t *testing.T) {
	h := newHost(t)
	src := h.source()
	h.must(unix.Mount(src, src, "", unix.MS_BIND, ""))
	t.Cleanup(func() { mount.UnmountRecursive(src, unix.MNT_DETACH) }) //nolint:errcheck // the test's own
	h.must(unix.Mount("", src, "", unix.MS_SHARED, ""))
	h.tmpfs(filepath.Join(src, "sub"))
	for i, a := range []Attributes{
		{},
		{Recursive: true},
		{Recursive: true, ReadOnly: true},
		{Recursive: true, AllReadOnly: true},
	} {
		tree, err := Here{}.Clone(src, a.Recursive)
		h.must(err)
		target := filepath.Join(h.private, fmt.Sprint(i))
		h.must(os.Mkdir(target, 0o700))
		h.must(Attach(tree, target, a))
		h.must(tree.Close())
		seen := filepath.Join(h.share, fmt.Sprint(i))
		if err := write(filepath.Join(seen, "f")); errors.Is(err, unix.EROFS) != (a.ReadOnly || a.AllReadOnly) {
			t.Errorf("%+v: write: %v", a, err)
		}
		_, err = os.Stat(filepath.Join(seen, "sub", "f"))
		if (err == nil) != a.Recursive {
			t.Errorf("%+v: the mount below: %v", a, err)
		}
		if err := write(filepath.Join(seen, "sub", "f")); a.Recursive && errors.Is(err, unix.EROFS) != a.AllReadOnly {
			t.Errorf("%+v: write to the mount below: %v", a, err)
		}
		h.tmpfs(filepath.Join(src, "later", fmt.Sprint(i)))
		if _, err := os.Stat(filepath.Join(seen, "later", fmt.Sprint(i), "f")); err == nil {
			t.Errorf("%+v: a mount that came later: %v", a, err)
		}
		if below, err := FileSystems(target); err != nil || !slices.Contains(below, target) || slices.Contains(below, filepath.Join(target, "sub")) != a.Recursive {
			t.Errorf("%+v: file systems %v, %v", a, below, err)
		}
		for range 2 {
			h.must(Detach(target))
		}
	}
	for _, f := range []string{"f", "sub/f", "later/0/f"} {
		if _, err := os.Stat(filepath.Join(src, f)); err != nil {
			t.Errorf("unsharing took the host's own: %v", err)
		}
	}
}

func TestRootfs(t *testing.T) {
	h := newHost(t)
	src := h.source()
	bind := mount.Mount{Type: "bind", Source: src, Options: []string{"bind", "ro"}}
	for name, tt := range map[string]struct {
		mounts []mount.Mount
		dir    string
		want   string
	}{
		"by path":      {dir: src},
		"by mounts":    {mounts: []mount.Mount{bind}},
		"by a stack":   {mounts: []mount.Mount{{Type: "tmpfs", Source: "tmpfs"}, bind}},
		"missing":      {dir: src + "/none", want: src + "/none does not exist"},
		"a file":       {dir: src + "/f", want: "is not a directory"},
		"second fails": {mounts: []mount.Mount{bind, {Type: "bind", Source: src + "/none", Options: []string{"bind"}}}, want: "mount the rootfs"},
	} {
		t.Run(name, func(t *testing.T) {
			s := h.newShare()
			err := s.Rootfs(tt.mounts, tt.dir)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
			} else if _, serr := os.Stat(h.seen("rootfs", "f")); err != nil || serr != nil {
				t.Error(err, serr)
			}
			h.must(s.Close())
			h.must(s.Close()) // again
			if _, err := os.Stat(filepath.Join(src, "f")); err != nil {
				t.Errorf("a file of the host is gone: %v", err)
			}
			if _, err := os.Lstat(h.seen()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the container's directory is left: %v", err)
			}
		})
	}
}

// A mount that the host makes after the shim's namespace has parted from its own,
// without propagation between the two, is shared nonetheless.
func TestMountsOfTheHostThatComeLater(t *testing.T) {
	h := newHost(t)
	later := h.TempDir()
	file, err := os.Open("/proc/thread-self/ns/mnt")
	h.must(err)
	ns := hostns.New(file)
	defer ns.Close() //nolint:errcheck // read only
	parted, mounted, result := make(chan error), make(chan struct{}), make(chan error)
	go func() { // the shim: its thread ends with the goroutine
		runtime.LockOSThread()
		parted <- errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""))
		<-mounted
		result <- func() error {
			s, err := New(filepath.Join(h.private, "c"), "", ns.Clone)
			if err != nil {
				return err
			}
			err = s.Rootfs(nil, later)
			for name, want := range map[string]bool{"rootfs/f": true, "rootfs/sub/f": true} {
				if _, serr := os.Stat(filepath.Join(h.private, "c", name)); (serr == nil) != want {
					t.Errorf("%s: %v", name, serr)
				}
			}
			return errors.Join(err, s.Close())
		}()
	}()
	h.must(<-parted)
	h.tmpfs(later)
	h.tmpfs(filepath.Join(later, "sub"))
	close(mounted)
	h.must(<-result)
	for _, f := range []string{filepath.Join(later, "f"), filepath.Join(later, "sub", "f")} {
		if _, err := os.Stat(f); err != nil {
			t.Errorf("unsharing took the host's own: %v", err)
		}
	}
}

func TestRemoveTreeNeverDeletesWhatAMountShows(t *testing.T) {
	h := newHost(t)
	src := h.source()
	dir := filepath.Join(h.dir, "sandbox")
	target := filepath.Join(dir, "a", "b")
	h.must(os.MkdirAll(target, 0o700))
	h.must(unix.Mount(src, target, "", unix.MS_BIND, ""))

	// As if the mount had come after the unmounting.
	parent, err := os.Open(h.dir)
	h.must(err)
	defer parent.Close() //nolint:errcheck // read only
	if err := remove(int(parent.Fd()), "sandbox", dir); err == nil || !strings.Contains(err.Error(), target+" is still mounted") {
		t.Errorf("remove: %v, want that it is still mounted", err)
	}
	h.must(os.Symlink(src, filepath.Join(dir, "link")))
	for range 2 {
		h.must(RemoveTree(dir))
	}
	if _, err := os.Stat(filepath.Join(src, "f")); err != nil {
		t.Errorf("a file of the host is gone: %v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tree is left: %v", err)
	}
}
