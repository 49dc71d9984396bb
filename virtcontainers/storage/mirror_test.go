package storage

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/hostns"
)

// shared makes a source whose mounts propagate, as the host's do.
func (h host) shared() string {
	h.Helper()
	src := h.source()
	h.must(unix.Mount(src, src, "", unix.MS_BIND, ""))
	h.Cleanup(func() { mount.UnmountRecursive(src, unix.MNT_DETACH) }) //nolint:errcheck // the test's own
	h.must(unix.Mount("", src, "", unix.MS_SHARED, ""))
	return src
}

// mirror shows src, and returns where the guest has it.
func (h host) mirror(src string, a Attributes) (*Mirror, string) {
	h.Helper()
	tree, err := Here{}.Clone(src, a.Recursive)
	h.must(err)
	target, err := os.MkdirTemp(h.private, "")
	h.must(err)
	m, err := NewMirror(tree, h.dir, target, a)
	h.must(err)
	h.Cleanup(func() { h.must(m.Close()) })
	return m, filepath.Join(h.share, filepath.Base(target))
}

// file is a tmpfs at dir with a file of that name.
func (h host) file(dir, name string) {
	h.Helper()
	h.tmpfs(dir)
	h.must(os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, name)))
}

// wants wants the paths below dir to be all that there is, but for directories.
func (h host) wants(dir string, paths ...string) {
	h.Helper()
	var got []string
	h.must(filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			got = append(got, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	}))
	if slices.Sort(paths); !slices.Equal(got, paths) {
		h.Errorf("%s has %v, want %v", dir, got, paths)
	}
}

// use has a file of dir open, and a process that works there, until the test ends.
func (h host) use(dir string) {
	h.Helper()
	file, err := os.OpenFile(dir, unix.O_PATH, 0)
	h.must(err)
	cmd := exec.Command("cat")
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	h.must(err)
	h.must(cmd.Start())
	h.Cleanup(func() {
		file.Close() //nolint:errcheck // a path only
		h.must(errors.Join(in.Close(), cmd.Wait()))
	})
}

func TestAMirrorKeepsNothingOfTheHostBusy(t *testing.T) {
	h := newHost(t)
	src := h.shared()
	h.file(filepath.Join(src, "before"), "b")
	m, seen := h.mirror(src, Attributes{Recursive: true})
	h.file(filepath.Join(src, "later"), "l")
	h.file(filepath.Join(src, "later/below"), "lb")
	h.must(m.Sync())
	h.wants(seen, "f", "before/b", "later/l", "later/below/lb")
	for _, dir := range []string{"", "before", "later", "later/below"} {
		h.use(filepath.Join(seen, dir))
	}
	for _, dir := range []string{"before", "later/below", "later"} {
		h.must(unix.Unmount(filepath.Join(src, dir), 0))
	}
	h.must(m.Sync())
	h.wants(seen, "f")
	// What is still mounted by the host goes from the guest, and from there alone.
	h.file(filepath.Join(src, "last"), "x")
	h.must(m.Sync())
	h.use(filepath.Join(seen, "last"))
	h.must(m.Close())
	h.must(m.Sync())
	h.wants(seen)
	h.wants(src, "f", "last/x")
	h.must(unix.Unmount(filepath.Join(src, "last"), 0))
	h.must(unix.Unmount(src, 0))
	entries, err := os.ReadDir(h.dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left on the host: %v, %v", entries, err)
	}
}

// Each step changes the host's mounts below a source.
func TestAMirrorShowsWhatAWalkFinds(t *testing.T) {
	h := newHost(t)
	src := h.shared()
	at := func(path string) string { return filepath.Join(src, path) }
	mounts := func(path, name string) func() { return func() { h.file(at(path), name) } }
	unmounts := func(path string) func() { return func() { h.must(unix.Unmount(at(path), 0)) } }
	other := h.source()
	for _, dir := range []string{"a/b/c", "p/q/r"} {
		h.must(os.MkdirAll(at(dir), 0o700))
	}
	m, seen := h.mirror(src, Attributes{Recursive: true})
	for i, step := range []struct {
		change []func()
		want   []string
	}{
		{[]func(){mounts("a", "1")}, []string{"a/1"}},
		{[]func(){mounts("a", "2")}, []string{"a/2"}}, // on top
		{[]func(){mounts("a/below", "3")}, []string{"a/2", "a/below/3"}},
		{[]func(){unmounts("a/below"), unmounts("a")}, []string{"a/1"}},
		{[]func(){unmounts("a"), mounts("a", "4")}, []string{"a/4"}}, // replaced, as a rule with the same id
		{[]func(){unmounts("a")}, nil},

		{[]func(){mounts("p/q/r", "5")}, []string{"p/q/r/5"}},
		{[]func(){mounts("p", "6")}, []string{"p/6"}}, // hides it
		// The same file system at the same path, but on what hides it.
		{[]func(){unmounts("p")}, []string{"p/q/r/5"}},
		{[]func(){
			func() { h.must(os.Rename(at("p"), at("away"))) },
			func() { h.must(os.MkdirAll(at("p/q"), 0o700)) },
			mounts("p/q", "7"),
			func() { h.must(os.Mkdir(at("p/q/r"), 0o700)) },
			func() { h.must(unix.Mount(at("away/q/r"), at("p/q/r"), "", unix.MS_BIND, "")) },
		}, []string{"p/q/7", "p/q/r/5", "away/q/r/5"}},
		// One that others are on is replaced, and they are as before.
		{[]func(){
			unmounts("p/q/r"), unmounts("p/q"), mounts("p/q", "8"),
			func() { h.must(os.Mkdir(at("p/q/r"), 0o700)) },
			func() { h.must(unix.Mount(at("away/q/r"), at("p/q/r"), "", unix.MS_BIND, "")) },
		}, []string{"p/q/8", "p/q/r/5", "away/q/r/5"}},
		{[]func(){unmounts("p/q/r"), unmounts("p/q"), unmounts("away/q/r")}, nil},

		// A file, a tree at once, and one that has moved.
		{[]func(){
			func() { h.must(os.WriteFile(at("file"), nil, 0o600)) },
			func() { h.must(unix.Mount(filepath.Join(other, "f"), at("file"), "", unix.MS_BIND, "")) },
		}, []string{"file"}},
		{[]func(){unmounts("file")}, []string{"file"}}, // an empty one
		{[]func(){func() { h.must(os.Remove(at("file"))) }}, nil},
		{[]func(){
			func() { h.tmpfs(filepath.Join(other, "sub")) },
			func() { h.must(os.Mkdir(at("tree"), 0o700)) },
			func() { h.must(unix.Mount(other, at("tree"), "", unix.MS_BIND|unix.MS_REC, "")) },
		}, []string{"tree/f", "tree/sub/f"}},
		{[]func(){
			unmounts("tree/sub"), unmounts("tree"),
			func() { h.must(unix.Mount(other, at("a/b/c"), "", unix.MS_BIND, "")) },
		}, []string{"a/b/c/f"}},
		{[]func(){unmounts("a/b/c")}, nil},

		// What is over the source itself, the guest does not see; nor what is below that.
		{[]func(){mounts("", "over"), mounts("n", "9")}, nil},
		{[]func(){unmounts("n"), unmounts(""), mounts("n", "10")}, []string{"n/10"}},
		{[]func(){mounts("with a space\n", "11")}, []string{"n/10", "with a space\n/11"}},
	} {
		for _, change := range step.change {
			change()
		}
		h.must(m.Sync())
		h.wants(seen, append(step.want, "f")...)
		if t.Failed() {
			t.Fatalf("after step %d", i)
		}
	}
}

func TestAMirrorIsAsReadOnlyAsItsBind(t *testing.T) {
	h := newHost(t)
	src := h.shared()
	h.tmpfs(filepath.Join(src, "before"))
	for _, a := range []Attributes{{Recursive: true}, {Recursive: true, ReadOnly: true}, {Recursive: true, AllReadOnly: true}} {
		m, seen := h.mirror(src, a)
		h.tmpfs(filepath.Join(src, "later"))
		h.tmpfs(filepath.Join(src, "later", "closed"))
		h.must(unix.Mount("", filepath.Join(src, "later", "closed"), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		h.must(unix.Mount(filepath.Join(src, "later", "closed"), filepath.Join(src, "later", "closed"), "", unix.MS_BIND, ""))
		for range 2 {
			h.must(m.Sync())
			for path, readOnly := range map[string]bool{
				"f": a.ReadOnly || a.AllReadOnly, "before/f": a.AllReadOnly, "later/f": a.AllReadOnly, "later/closed/f": true,
			} {
				if err := write(filepath.Join(seen, path)); errors.Is(err, unix.EROFS) != readOnly {
					t.Errorf("%+v: write to %s: %v", a, path, err)
				}
			}
		}
		h.must(mount.UnmountRecursive(filepath.Join(src, "later"), 0))
	}
}

// A bind that is not recursive begins without what is mounted already.
func TestAMirrorOfOneMount(t *testing.T) {
	h := newHost(t)
	src := h.shared()
	h.file(filepath.Join(src, "before"), "b")
	m, seen := h.mirror(src, Attributes{})
	h.file(filepath.Join(src, "later"), "l")
	h.must(m.Sync())
	h.wants(seen, "f", "later/l")
}

// A container that may write can move the directory of a mount away, and put a
// symbolic link there.
func TestAMirrorFollowsNoSymbolicLink(t *testing.T) {
	h := newHost(t)
	src, elsewhere := h.shared(), h.shared()
	h.file(filepath.Join(src, "a", "m"), "1")
	h.file(filepath.Join(elsewhere, "m"), "precious")
	m, seen := h.mirror(src, Attributes{Recursive: true})
	h.must(os.Rename(filepath.Join(seen, "a"), filepath.Join(seen, "moved")))
	h.must(os.Symlink(elsewhere, filepath.Join(seen, "a")))
	for path, want := range map[string]error{"a/m": unix.ELOOP, "../x": unix.EXDEV} {
		if err := m.show(m.second, path); !errors.Is(err, want) {
			t.Errorf("show %s: %v, want %v", path, err, want)
		}
		if err := detachBelow(m.second, path); !errors.Is(err, want) {
			t.Errorf("detach %s: %v, want %v", path, err, want)
		}
	}
	h.wants(elsewhere, "f", "m/precious")
	h.file(filepath.Join(src, "later"), "2")
	h.must(m.Sync())
	h.wants(seen, "a", "f", "later/2", "moved/m/1")
	h.must(unix.Unmount(filepath.Join(src, "moved", "m"), 0))
	h.must(m.Sync())
	h.wants(seen, "a", "f", "later/2")
}

// The shim's mounts need not follow the host's.
func TestAMirrorInANamespaceThatFollowsNothing(t *testing.T) {
	h := newHost(t)
	src := h.shared()
	file, err := os.Open("/proc/thread-self/ns/mnt")
	h.must(err)
	ns := hostns.New(file)
	defer ns.Close() //nolint:errcheck // read only
	begun, changed, done := make(chan error), make(chan struct{}), make(chan error)
	target := filepath.Join(h.private, "target")
	h.must(os.Mkdir(target, 0o700))
	go func() { // the shim: its thread ends with the goroutine
		runtime.LockOSThread()
		var m *Mirror
		begun <- func() error {
			err := errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
			if err != nil {
				return err
			}
			tree, err := ns.Clone(src, true)
			if err != nil {
				return err
			}
			m, err = NewMirror(tree, h.dir, target, Attributes{Recursive: true})
			return err
		}()
		for range changed {
			err := m.Sync()
			names, rerr := os.ReadDir(filepath.Join(target, "later"))
			if errors.Is(rerr, fs.ErrNotExist) {
				rerr = nil
			}
			if len(names) != 1 {
				rerr = errors.Join(rerr, fs.ErrNotExist)
			}
			done <- errors.Join(err, rerr)
		}
		done <- m.Close()
	}()
	h.must(<-begun)
	later := filepath.Join(src, "later")
	h.tmpfs(later)
	changed <- struct{}{}
	h.must(<-done)
	h.must(unix.Unmount(later, 0))
	changed <- struct{}{}
	if err := <-done; !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what the host has unmounted is there: %v", err)
	}
	close(changed)
	h.must(<-done)
	h.must(unix.Unmount(src, 0))
}
