package sockets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// watch begins to watch what make has put into a directory.
func watch(t *testing.T, fill func(dir string)) (*watched, []string) {
	t.Helper()
	w := &watched{T: t, dir: t.TempDir(), changes: make(chan Change, 10000)}
	fill(w.dir)
	w.root = openDir(t, w.dir)
	watcher, present, err := Watch(w.root, slog.New(slog.NewTextHandler(&w.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- watcher.Run(ctx, func(c Change) { w.changes <- c }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(limit):
			t.Error("Run does not return")
		}
	})
	return w, present
}

// bind makes a socket.
func (w *watched) bind(name string) {
	w.Helper()
	bind(w.T, filepath.Join(w.dir, name))
}

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
	ln.Close()
	if err := os.Rename(filepath.Join(dir, "s"), path); err != nil {
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
	// Directories come whole, and go whole.
	other := t.TempDir()
	w.do(os.MkdirAll(filepath.Join(other, "new/deep"), 0o700))
	bind(t, filepath.Join(other, "new/deep/s"))
	w.do(os.Rename(filepath.Join(other, "new"), filepath.Join(w.dir, "new")))
	w.want(state, "a/b/c/s", "a/s", "new/deep/s", "u")
	w.bind("new/deep/t")
	w.want(state, "a/b/c/s", "a/s", "new/deep/s", "new/deep/t", "u")
	w.do(os.Rename(filepath.Join(w.dir, "new"), filepath.Join(w.dir, "moved")))
	w.want(state, "a/b/c/s", "a/s", "moved/deep/s", "moved/deep/t", "u")
	w.bind("moved/deep/v")
	w.want(state, "a/b/c/s", "a/s", "moved/deep/s", "moved/deep/t", "moved/deep/v", "u")
	w.do(os.RemoveAll(filepath.Join(w.dir, "a")))
	w.want(state, "moved/deep/s", "moved/deep/t", "moved/deep/v", "u")
	w.do(os.Rename(filepath.Join(w.dir, "moved"), filepath.Join(other, "gone")))
	w.want(state, "u")
	// A file in its place is no socket.
	w.do(errors.Join(os.Remove(filepath.Join(w.dir, "u")), os.WriteFile(filepath.Join(w.dir, "u"), nil, 0o600)))
	w.want(state)
	for range 100 {
		w.do(os.MkdirAll(filepath.Join(w.dir, "x/y/z"), 0o700))
		w.bind("x/y/z/s")
		w.want(state, "x/y/z/s")
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
		for i := range maxWatched + 100 {
			if err := os.Link(first, fmt.Sprintf("%s%d", first, i)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if len(present) != maxWatched-1 { // with the directory
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

// Lost events are made up for by looking at everything.
func TestWatchAfterAnOverflow(t *testing.T) {
	dir := t.TempDir()
	bind(t, filepath.Join(dir, "old"))
	w, _, err := Watch(openDir(t, dir), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := errors.Join(os.Remove(filepath.Join(dir, "old")), os.Mkdir(filepath.Join(dir, "d"), 0o700)); err != nil {
		t.Fatal(err)
	}
	bind(t, filepath.Join(dir, "d/new"))
	overflow := make([]byte, unix.SizeofInotifyEvent)
	overflow[5] = unix.IN_Q_OVERFLOW >> 8
	copy(overflow, bytes.Repeat([]byte{0xff}, 4))
	if err := w.apply(overflow); err != nil {
		t.Fatal(err)
	}
	if c := w.take(); !slices.Equal(c.Added, []string{"d/new"}) || !slices.Equal(c.Removed, []string{"old"}) {
		t.Errorf("changes %v", c)
	}
}
