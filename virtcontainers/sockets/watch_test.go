package sockets

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/inotify"
)

// A watched is a directory with its Watcher.
type watched struct {
	*testing.T
	dir     string
	root    *os.File
	log     lockedBuffer
	changes chan Change
}

func openDir(t *testing.T, dir string) *os.File {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), dir)
	t.Cleanup(func() { f.Close() })
	return f
}

// watch begins to watch what fill has put into a directory.
func watch(t *testing.T, fill func(dir string)) (*watched, []string) {
	t.Helper()
	return watchBy(t, fill, bound)
}

// watchBy does so with a word of its own on which sockets are bound.
func watchBy(t *testing.T, fill func(dir string), bound func(*os.File) bool) (*watched, []string) {
	t.Helper()
	w := &watched{T: t, dir: t.TempDir(), changes: make(chan Change, 10000)}
	if fill != nil {
		fill(w.dir)
	}
	w.root = openDir(t, w.dir)
	instance := inotify.New()
	watcher, err := newWatcher(w.root, instance, slog.New(slog.NewTextHandler(&w.log, nil)), bound)
	if err != nil {
		t.Fatal(err)
	}
	present := watcher.take().Added
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { watcher.Run(ctx, func(c Change) { w.changes <- c }) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		if err := instance.Close(); err != nil {
			t.Error(err)
		}
	})
	return w, present
}

// bind makes a socket.
func (w *watched) bind(name string) {
	w.Helper()
	bind(w.T, filepath.Join(w.dir, name))
}

// bind makes a socket with a server, until the test ends.
func bind(t *testing.T, path string) {
	t.Helper()
	// Below another directory its name would be too long.
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	t.Cleanup(func() { ln.Close() })
	if err := os.Rename(filepath.Join(dir, "s"), path); err != nil {
		t.Fatal(err)
	}
}

// dead makes a socket that nobody is bound to, as the guest does.
func dead(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mknod(path, unix.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
}

func (w *watched) do(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// want waits until the changes since the last call make the sockets, by which those
// that were there are changed, what it says.
func (w *watched) want(state map[string]bool, want ...string) {
	w.Helper()
	deadline := time.After(limit)
	for {
		have := make([]string, 0, len(state))
		for name := range state {
			have = append(have, name)
		}
		slices.Sort(have)
		if slices.Equal(have, want) {
			return
		}
		select {
		case c := <-w.changes:
			for _, name := range c.Removed {
				delete(state, name)
			}
			for _, name := range c.Added {
				state[name] = true
			}
		case <-deadline:
			w.Fatalf("sockets %q, want %q", have, want)
		}
	}
}

func TestWatch(t *testing.T) {
	w, present := watch(t, func(dir string) {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "a/b/c/d"), 0o700), os.WriteFile(filepath.Join(dir, "file"), nil, 0o600),
			os.Symlink("a", filepath.Join(dir, "link"))); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"s", "a/s", "a/b/c/s", "a/b/c/d/s"} {
			bind(t, filepath.Join(dir, name))
		}
	})
	if want := []string{"a/b/c/s", "a/s", "s"}; !slices.Equal(present, want) {
		t.Fatalf("present are %q, want %q", present, want)
	}
	state := map[string]bool{"a/b/c/s": true, "a/s": true, "s": true}
	w.bind("t")
	w.want(state, "a/b/c/s", "a/s", "s", "t")
	w.do(os.Remove(filepath.Join(w.dir, "s")))
	w.want(state, "a/b/c/s", "a/s", "t")
	w.do(os.Rename(filepath.Join(w.dir, "t"), filepath.Join(w.dir, "u")))
	w.want(state, "a/b/c/s", "a/s", "u")
	// A directory in the root is followed when it comes, with what is in it; one that
	// is deeper is not.
	other := t.TempDir()
	w.do(os.MkdirAll(filepath.Join(other, "new/deep"), 0o700))
	bind(t, filepath.Join(other, "new/s"))
	bind(t, filepath.Join(other, "new/deep/s"))
	w.do(os.Rename(filepath.Join(other, "new"), filepath.Join(w.dir, "new")))
	w.want(state, "a/b/c/s", "a/s", "new/s", "u")
	w.bind("new/t")
	w.want(state, "a/b/c/s", "a/s", "new/s", "new/t", "u")
	w.do(os.Rename(filepath.Join(w.dir, "new"), filepath.Join(w.dir, "moved")))
	w.want(state, "a/b/c/s", "a/s", "moved/s", "moved/t", "u")
	w.bind("moved/v")
	w.want(state, "a/b/c/s", "a/s", "moved/s", "moved/t", "moved/v", "u")
	w.bind("a/b/c/t")
	w.want(state, "a/b/c/s", "a/b/c/t", "a/s", "moved/s", "moved/t", "moved/v", "u")
	w.do(os.RemoveAll(filepath.Join(w.dir, "a")))
	w.want(state, "moved/s", "moved/t", "moved/v", "u")
	w.do(os.Rename(filepath.Join(w.dir, "moved"), filepath.Join(other, "gone")))
	w.want(state, "u")
	// A file in its place is no socket.
	w.do(errors.Join(os.Remove(filepath.Join(w.dir, "u")), os.WriteFile(filepath.Join(w.dir, "u"), nil, 0o600)))
	w.want(state)
	for range 100 {
		w.do(os.Mkdir(filepath.Join(w.dir, "x"), 0o700))
		w.bind("x/s")
		w.want(state, "x/s")
		w.do(os.RemoveAll(filepath.Join(w.dir, "x")))
		w.want(state)
	}
}

// What is replaced, or gets another mode, is told of again.
func TestWatchTellsAgain(t *testing.T) {
	w, _ := watch(t, func(dir string) { bind(t, filepath.Join(dir, "s")) })
	again := func(what string) {
		t.Helper()
		for {
			select {
			case c := <-w.changes:
				if slices.Equal(c.Added, []string{"s"}) {
					return
				}
			case <-time.After(limit):
				t.Fatalf("%s: nothing is told", what)
			}
		}
	}
	w.do(os.Chmod(filepath.Join(w.dir, "s"), 0o777))
	again("another mode")
	w.bind("s") // over it
	again("another socket")
	w.do(os.Remove(filepath.Join(w.dir, "s")))
	w.bind("s")
	again("another after it")
}

func TestWatchIsBounded(t *testing.T) {
	w, present := watch(t, func(dir string) {
		first := filepath.Join(dir, "s")
		bind(t, first)
		for i := range maxKnown + 100 {
			if err := os.Link(first, fmt.Sprintf("%s%d", first, i)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if len(present) != maxKnown {
		t.Errorf("%d sockets are followed", len(present))
	}
	w.do(os.Link(filepath.Join(w.dir, "s"), filepath.Join(w.dir, "t")))
	w.do(os.Mkdir(filepath.Join(w.dir, "d"), 0o700))
	for _, name := range present[:2] {
		w.do(os.Remove(filepath.Join(w.dir, name)))
		for removed := false; !removed; {
			select {
			case c := <-w.changes:
				removed = slices.Contains(c.Removed, name)
			case <-time.After(limit):
				t.Fatal("nothing is told")
			}
		}
	}
	if n := strings.Count(w.log.String(), "\n"); n != 1 {
		t.Errorf("%d lines of log:\n%s", n, w.log.String())
	}
}

// A server may run in a directory that was empty before.
func TestWatchDirectoriesInTheRoot(t *testing.T) {
	w, present := watch(t, func(dir string) {
		if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
			t.Fatal(err)
		}
	})
	if len(present) > 0 {
		t.Errorf("present are %q", present)
	}
	w.bind("run/s")
	w.want(map[string]bool{}, "run/s")
}

// What a container fills with files is not followed wherever it goes.
func TestWatchCostsLittle(t *testing.T) {
	w, present := watch(t, func(dir string) {
		for i := range 3 * maxDirs {
			if err := os.MkdirAll(filepath.Join(dir, "modules", fmt.Sprint(i), "lib"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Join(dir, "var/run"), 0o700); err != nil {
			t.Fatal(err)
		}
		bind(t, filepath.Join(dir, "var/run/s"))
	})
	if !slices.Equal(present, []string{"var/run/s"}) {
		t.Errorf("present are %q", present)
	}
	for i := range 1000 {
		dir := filepath.Join(w.dir, "more", fmt.Sprint(i))
		w.do(errors.Join(os.MkdirAll(filepath.Join(dir, "lib"), 0o700), os.WriteFile(filepath.Join(dir, "index"), nil, 0o600)))
	}
	state := map[string]bool{"var/run/s": true}
	w.bind("more/s") // after all the others
	w.want(state, "more/s", "var/run/s")
	if n := watches(t); n != 5 { // with modules, more, var and var/run
		t.Errorf("%d watches", n)
	}
	for i := range maxDirs {
		w.do(os.Mkdir(filepath.Join(w.dir, fmt.Sprint("d", i)), 0o700))
	}
	w.bind("s")
	w.want(state, "more/s", "s", "var/run/s")
	if n := watches(t); n != maxDirs {
		t.Errorf("%d watches, want %d", n, maxDirs)
	}
	if n := strings.Count(w.log.String(), "\n"); n != 1 {
		t.Errorf("%d lines of log:\n%s", n, w.log.String())
	}
}

// Where there are too many directories, those that hold sockets are followed first.
func TestWatchPrefersDirectoriesWithSockets(t *testing.T) {
	w, present := watch(t, func(dir string) {
		for i := range maxDirs + 10 {
			if err := os.Mkdir(filepath.Join(dir, fmt.Sprint("a", i)), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Join(dir, "z/z"), 0o700); err != nil {
			t.Fatal(err)
		}
		bind(t, filepath.Join(dir, "z/z/s"))
	})
	if !slices.Equal(present, []string{"z/z/s"}) {
		t.Errorf("present are %q", present)
	}
	w.bind("z/z/t")
	w.want(map[string]bool{}, "z/z/t")
}

// watches counts them, as the kernel has them.
func watches(t *testing.T) (n int) {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		b, _ := os.ReadFile(fd) // it may be closed by now
		n += strings.Count(string(b), "inotify wd:")
	}
	return n
}

// Sockets that nobody on the host is bound to are nobody's business here.
func TestWatchDeadSockets(t *testing.T) {
	looked := make(chan string, 100)
	w, present := watchBy(t, func(dir string) {
		dead(t, filepath.Join(dir, "guest"))
		bind(t, filepath.Join(dir, "host"))
	}, func(f *os.File) bool {
		is := bound(f)
		if leads, err := os.Readlink(proc(int(f.Fd()))); err == nil {
			looked <- filepath.Base(leads)
		}
		return is
	})
	if !slices.Equal(present, []string{"host"}) {
		t.Errorf("present are %q", present)
	}
	twice := func(name string) {
		t.Helper()
		for n := 0; n < 2; {
			select {
			case l := <-looked:
				if l == name {
					n++
				}
			case <-time.After(limit):
				t.Fatalf("%s was looked at %d times", name, n)
			}
		}
	}
	twice("guest")
	dead(t, filepath.Join(w.dir, "another"))
	twice("another")
	w.do(os.Chmod(filepath.Join(w.dir, "guest"), 0o777)) // in vain
	w.bind("last")
	w.want(map[string]bool{"host": true}, "host", "last")
	// A server takes the place of a dead socket, and a dead one a server's.
	w.bind("guest")
	w.want(map[string]bool{"host": true, "last": true}, "guest", "host", "last")
	w.do(os.Remove(filepath.Join(w.dir, "last")))
	dead(t, filepath.Join(w.dir, "last"))
	w.want(map[string]bool{"guest": true, "host": true, "last": true}, "guest", "host")
}

// A socket's file is there a moment before a process is bound to it.
func TestWatchLooksOnceMore(t *testing.T) {
	var asked, listening atomic.Int32
	w, _ := watchBy(t, nil, func(*os.File) bool { return asked.Add(1) > 1 && listening.Load() == 0 })
	dead(t, filepath.Join(w.dir, "s"))
	w.want(map[string]bool{}, "s")
	if n := asked.Load(); n != 2 {
		t.Errorf("asked %d times", n)
	}
	// After that its mode or owner says so.
	listening.Store(1)
	w.do(os.Chmod(filepath.Join(w.dir, "s"), 0o660))
	w.want(map[string]bool{"s": true})
	listening.Store(0)
	w.do(os.Chmod(filepath.Join(w.dir, "s"), 0o666))
	w.want(map[string]bool{}, "s")
}

func TestBound(t *testing.T) {
	dir := t.TempDir()
	is := func(path string, want bool) {
		t.Helper()
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		if got := bound(f); got != want {
			t.Errorf("%s is bound: %v", path, got)
		}
	}
	dead(t, filepath.Join(dir, "dead"))
	is(filepath.Join(dir, "dead"), false)
	for name, kind := range map[string]int{"stream": unix.SOCK_STREAM, "packets": unix.SOCK_SEQPACKET, "datagrams": unix.SOCK_DGRAM} {
		path := hostPath(t)
		fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		is(path, true) // before listen
		if kind == unix.SOCK_DGRAM {
			_, err = unix.Read(fd, make([]byte, 1))
		} else if err = unix.Listen(fd, 1); err == nil {
			is(path, true)
			_, _, err = unix.Accept(fd)
		}
		if !errors.Is(err, unix.EAGAIN) {
			t.Errorf("the server of %s has seen something: %v", name, err)
		}
		unix.Close(fd)
		is(path, false)
	}
}

func TestBoundInAnotherNetwork(t *testing.T) {
	path := hostPath(t)
	type result struct {
		ln  net.Listener
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // the thread ends with this
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.ln, r.err = net.Listen("unix", path)
		}
		made <- r
	}()
	r := <-made
	if errors.Is(r.err, unix.EPERM) {
		t.Skipf("network namespaces: %v", r.err)
	}
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.ln.Close()
	_, present := watch(t, func(dir string) {
		if err := os.Rename(path, filepath.Join(dir, "s")); err != nil {
			t.Fatal(err)
		}
	})
	if !slices.Equal(present, []string{"s"}) {
		t.Errorf("present are %q", present)
	}
}

// Lost events are made up for by looking at everything.
func TestWatchAfterLostEvents(t *testing.T) {
	for what, lose := range map[string]func(*Watcher){
		"by the kernel": func(w *Watcher) { w.note(inotify.Event{Watch: -1, Mask: unix.IN_Q_OVERFLOW}) },
		"here": func(w *Watcher) {
			for range maxQueued + 1 {
				w.note(inotify.Event{})
			}
		},
	} {
		dir := t.TempDir()
		for _, name := range []string{"old", "stays"} {
			bind(t, filepath.Join(dir, name))
		}
		instance := inotify.New()
		w, _, err := Watch(openDir(t, dir), instance, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		lose(w)
		if err := errors.Join(os.Remove(filepath.Join(dir, "old")), os.Mkdir(filepath.Join(dir, "d"), 0o700)); err != nil {
			t.Fatal(err)
		}
		bind(t, filepath.Join(dir, "d/new"))
		w.apply()
		if c := w.take(); !slices.Equal(c.Added, []string{"d/new", "stays"}) || !slices.Equal(c.Removed, []string{"old"}) {
			t.Errorf("%s: changes %v", what, c)
		}
		w.Close()
		if err := instance.Close(); err != nil {
			t.Error(err)
		}
	}
}
