package inotify

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// in returns an instance, and a directory by O_PATH.
func in(t *testing.T) (*Instance, *os.File) {
	t.Helper()
	i := New()
	t.Cleanup(func() {
		for range 2 {
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), dir)
	t.Cleanup(func() { f.Close() })
	return i, f
}

// subscribe returns a subscriber, and its events.
func subscribe(i *Instance) (*Subscriber, chan Event) {
	events := make(chan Event, 100)
	return i.Subscribe(func(e Event) { events <- e }), events
}

func add(t *testing.T, s *Subscriber, f *os.File, mask uint32) int32 {
	t.Helper()
	watch, err := s.Add(int(f.Fd()), mask)
	if err != nil {
		t.Fatal(err)
	}
	return watch
}

func want(t *testing.T, events chan Event, want Event) {
	t.Helper()
	select {
	case e := <-events:
		if e != want {
			t.Errorf("event %+v, want %+v", e, want)
		}
	case <-time.After(limit):
		t.Errorf("no event, want %+v", want)
	}
}

// kernel lists the inotify instances of this process, as how many watches each has.
func kernel(t *testing.T) (instances []int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if leads, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasSuffix(leads, "inotify") {
			b, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
			if err != nil {
				t.Fatal(err)
			}
			instances = append(instances, strings.Count(string(b), "inotify wd:"))
		}
	}
	return instances
}

func has(t *testing.T, want ...int) {
	t.Helper()
	if have := kernel(t); fmt.Sprint(have) != fmt.Sprint(want) {
		t.Errorf("instances with %v watches, want %v", have, want)
	}
}

func touch(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSubscribersShareAWatch(t *testing.T) {
	i, dir := in(t)
	one, ones := subscribe(i)
	two, twos := subscribe(i)
	has(t) // none without a watch
	watch := add(t, one, dir, unix.IN_CREATE)
	if other := add(t, two, dir, unix.IN_DELETE); other != watch {
		t.Fatalf("one directory has the watches %d and %d", watch, other)
	}
	has(t, 1)
	path := filepath.Join(dir.Name(), "f")
	touch(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// Each is told of what it asked for, and of nothing else.
	want(t, ones, Event{Watch: watch, Mask: unix.IN_CREATE, Name: "f"})
	want(t, twos, Event{Watch: watch, Mask: unix.IN_DELETE, Name: "f"})
	two.Remove(watch)
	two.Remove(watch)
	has(t, 1) // the first has it still
	touch(t, path)
	want(t, ones, Event{Watch: watch, Mask: unix.IN_CREATE, Name: "f"})
	one.Close()
	has(t, 0)
	again := add(t, two, dir, unix.IN_DELETE_SELF)
	if again == watch {
		t.Errorf("watch %d is used again", again)
	}
	// An open directory is not gone.
	if err := errors.Join(dir.Close(), os.Remove(path), os.Remove(dir.Name())); err != nil {
		t.Fatal(err)
	}
	want(t, twos, Event{Watch: again, Mask: unix.IN_DELETE_SELF})
	want(t, twos, Event{Watch: again, Mask: unix.IN_IGNORED})
	two.Remove(again)
	for _, events := range []chan Event{ones, twos} {
		select {
		case e := <-events:
			t.Errorf("event %+v more", e)
		default:
		}
	}
}

// Where the kernel has no room for events every subscriber is told.
func TestLostEvents(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	if err != nil {
		t.Fatal(err)
	}
	var most int
	if _, err := fmt.Sscan(string(b), &most); err != nil || most > 1<<20 {
		t.Skipf("%d events, %v", most, err)
	}
	i, dir := in(t)
	held := make(chan struct{}) // keeps the instance from reading
	busy := make(chan struct{}, 1)
	lost := make(chan string, 2)
	first := i.Subscribe(func(e Event) {
		if e.Mask&unix.IN_Q_OVERFLOW != 0 {
			lost <- "first"
			return
		}
		select {
		case busy <- struct{}{}:
			<-held
		default:
		}
	})
	add(t, first, dir, unix.IN_CREATE|unix.IN_DELETE)
	second := i.Subscribe(func(e Event) {
		if e.Mask&unix.IN_Q_OVERFLOW != 0 {
			lost <- "second"
		}
	})
	quiet, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	add(t, second, quiet, unix.IN_CREATE)
	path := filepath.Join(dir.Name(), "f")
	for range most/2 + 5000 { // what is read at once is no longer in the queue
		touch(t, path)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	close(held)
	told := map[string]bool{}
	for range 2 {
		select {
		case who := <-lost:
			told[who] = true
		case <-time.After(limit):
		}
	}
	if !told["first"] || !told["second"] {
		t.Errorf("told were %v", told)
	}
}

func TestClose(t *testing.T) {
	i, dir := in(t)
	s, _ := subscribe(i)
	watch := add(t, s, dir, unix.IN_CREATE)
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	has(t)
	if _, err := s.Add(int(dir.Fd()), unix.IN_CREATE); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a watch after Close: %v", err)
	}
	s.Remove(watch)
	s.Close()
}
