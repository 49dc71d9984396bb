package storage

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/hostns"
	"github.com/husk-containers/husk/virtcontainers/spec"
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
	s, err := New(filepath.Join(h.private, "c"), "/bundle", nil)
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
	h.must(s.Bind(0, spec.Bind{Field: "m", Source: src}))
	elsewhere := h.source()
	for what, err := range map[string]error{
		"make a container":          os.Mkdir(filepath.Join(h.share, "d"), 0o700),
		"make a mount":              os.Mkdir(h.seen("mnt", "1"), 0o700),
		"make a symlink":            os.Symlink(elsewhere, h.seen("mnt", "1")),
		"write a file":              write(h.seen("x")),
		"remove the container":      os.Remove(h.seen()),
		"move the container away":   os.Rename(h.seen(), filepath.Join(h.share, "d")),
		"move a directory of mount": os.Rename(h.seen("mnt"), h.seen("mnt2")),
		"change the mode":           os.Chmod(h.seen("mnt"), 0o777),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("the guest could %s: %v, want EROFS", what, err)
		}
	}
	// A mount point is busy besides, whoever tries.
	for _, name := range []string{h.seen("rootfs"), h.seen("mnt", "0")} {
		if err := os.Rename(name, name+"x"); err == nil {
			t.Errorf("the guest could move %s", name)
		}
	}
	h.must(write(h.seen("rootfs", "new"))) // what is mounted below is as writable as it is
	h.must(write(h.seen("mnt", "0", "new")))
	h.must(s.Close())
}

func TestBind(t *testing.T) {
	h := newHost(t)
	s := h.newShare()
	src := h.source()
	socket := filepath.Join(src, "s")
	l, err := net.Listen("unix", socket)
	h.must(err)
	defer l.Close() //nolint:errcheck // the test's own
	h.must(unix.Mkfifo(filepath.Join(src, "p"), 0o600))
	h.must(os.Symlink("f", filepath.Join(src, "link")))
	for i, tt := range []struct {
		source   string
		readOnly bool
		want     string // of the error
		class    func(error) bool
	}{
		{source: src},
		{source: src, readOnly: true},
		{source: filepath.Join(src, "f")},
		{source: filepath.Join(src, "f"), readOnly: true},
		{source: filepath.Join(src, "link")},
		{source: filepath.Join(src, "none"), want: "m: source " + src + "/none does not exist on the host", class: errdefs.IsNotFound},
		{source: "relative", want: "m: source /bundle/relative does not exist", class: errdefs.IsNotFound},
		{source: socket, want: "is a unix socket", class: errdefs.IsNotImplemented},
		{source: filepath.Join(src, "p"), want: "is a fifo", class: errdefs.IsNotImplemented},
		{source: "/dev/null", want: "is a device", class: errdefs.IsNotImplemented},
	} {
		err := s.Bind(i, spec.Bind{Field: "m", Source: tt.source, ReadOnly: tt.readOnly})
		if tt.want != "" {
			if err == nil || !strings.Contains(err.Error(), tt.want) || !tt.class(err) {
				t.Errorf("%s: %v, want %q", tt.source, err, tt.want)
			}
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		target := h.seen("mnt", string(rune('0'+i)))
		if st, err := os.Stat(target); err == nil && st.IsDir() {
			target = filepath.Join(target, "f")
		}
		if err := write(target); tt.readOnly != errors.Is(err, unix.EROFS) {
			t.Errorf("write to %s, read-only %t: %v", tt.source, tt.readOnly, err)
		}
	}
	h.must(s.Close())
}

func TestBindsOfTrees(t *testing.T) {
	h := newHost(t)
	src := h.source()
	h.must(unix.Mount(src, src, "", unix.MS_BIND, ""))
	t.Cleanup(func() { mount.UnmountRecursive(src, unix.MNT_DETACH) }) //nolint:errcheck // the test's own
	h.must(unix.Mount("", src, "", unix.MS_SHARED, ""))
	h.tmpfs(filepath.Join(src, "sub"))
	s := h.newShare()
	h.must(s.Bind(0, spec.Bind{Field: "m", Source: src}))
	h.must(s.Bind(1, spec.Bind{Field: "m", Source: src, Recursive: true}))
	h.must(s.Bind(2, spec.Bind{Field: "m", Source: src, Recursive: true, ReadOnly: true}))
	if _, err := os.Stat(h.seen("mnt", "0", "sub", "f")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("bind shows the mount below: %v", err)
	}
	h.must(write(h.seen("mnt", "1", "sub", "f")))
	if err := write(h.seen("mnt", "2", "sub", "f")); !errors.Is(err, unix.EROFS) {
		t.Errorf("the mount below a read-only source is writable: %v", err)
	}
	// One that comes later would be writable.
	h.tmpfs(filepath.Join(src, "later"))
	if _, err := os.Stat(h.seen("mnt", "2", "later", "f")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a later mount has come: %v", err)
	}
	h.must(s.Close())
	for _, f := range []string{"f", "sub/f", "later/f"} {
		if _, err := os.Stat(filepath.Join(src, f)); err != nil {
			t.Errorf("unsharing took the host's own: %v", err)
		}
	}
	if _, err := os.Lstat(h.seen()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the container's directory is left: %v", err)
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
	src, later := h.source(), h.TempDir()
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
			err = errors.Join(
				s.Rootfs(nil, later),
				s.Bind(0, spec.Bind{Field: "m", Source: src}),
				s.Bind(1, spec.Bind{Field: "m", Source: src, Recursive: true, ReadOnly: true}),
			)
			for name, want := range map[string]bool{"rootfs/f": true, "mnt/0/f": true, "mnt/0/sub/f": false, "mnt/1/sub/f": true} {
				if _, serr := os.Stat(filepath.Join(h.private, "c", name)); (serr == nil) != want {
					t.Errorf("%s: %v", name, serr)
				}
			}
			if werr := write(filepath.Join(h.private, "c/mnt/1/sub/f")); !errors.Is(werr, unix.EROFS) {
				t.Errorf("write to a read-only bind: %v", werr)
			}
			return errors.Join(err, s.Close())
		}()
	}()
	h.must(<-parted)
	h.tmpfs(later)
	h.tmpfs(filepath.Join(src, "sub"))
	close(mounted)
	h.must(<-result)
	for _, f := range []string{filepath.Join(later, "f"), filepath.Join(src, "sub", "f")} {
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
