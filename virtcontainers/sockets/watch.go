package sockets

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/inotify"
)

const (
	// maxKnown bounds the sockets that a Watcher knows of, and maxQueued the events
	// that wait for it. With more it looks at everything anew.
	maxKnown  = 1000
	maxQueued = 4096
	// boundWithin is how soon after it appears a socket is looked at once more: bind
	// makes the file first, and there is no event for what comes next.
	boundWithin = 100 * time.Millisecond
	// watchMask: what appears, goes, or gets another mode or owner.
	watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_ONLYDIR
)

// A Change is what has become of the sockets of a directory: their paths, relative
// and clean, in lexical order. One that was replaced by another, or has another mode
// or owner, is in Added again.
type Change struct{ Added, Removed []string }

// A Watcher follows the sockets in a directory of the host that a process of the
// host is bound to. There may be others: a container's own, and those of servers
// that are gone. Symbolic links are not followed: what one leads to within the
// directory is seen at its own place.
//
// It follows the directory itself, the directories in it, and of deeper ones those
// that hold a socket, or lead to one, when it begins. A container may fill the
// directory, so what is no socket costs little: an event, and a stat of what appears.
type Watcher struct {
	root   *os.File
	log    *slog.Logger
	bound  func(*os.File) bool
	events *inotify.Subscriber
	ready  chan struct{} // holds one when there are events

	mu    sync.Mutex
	queue []inotify.Event
	lost  bool // events; then queue is of no use

	// What is below belongs to Watch, then to Run.
	watches map[string]int32     // of each directory that is followed; "." is the root
	dirs    map[int32]string     // and back
	socks   map[string]bool      // those that are known, and whether a process is bound to them
	again   map[string]time.Time // when to look at one once more
	logged  map[string]bool      // what was logged, once

	// What has changed since it was last told.
	added, removed map[string]bool
}

// Watch begins to follow the sockets of dir, an O_PATH file that stays the caller's
// and open until Run has returned. It also returns those that are there. Either Run
// or Close has to be called.
func Watch(dir *os.File, instance *inotify.Instance, log *slog.Logger) (*Watcher, []string, error) {
	w, err := newWatcher(dir, instance, log, bound)
	if err != nil {
		return nil, nil, fmt.Errorf("watch %s for sockets: %w", dir.Name(), err)
	}
	return w, w.take().Added, nil
}

func newWatcher(dir *os.File, instance *inotify.Instance, log *slog.Logger, bound func(*os.File) bool) (*Watcher, error) {
	w := &Watcher{
		root: dir, log: log, bound: bound, ready: make(chan struct{}, 1),
		watches: map[string]int32{}, dirs: map[int32]string{}, socks: map[string]bool{},
		again: map[string]time.Time{}, logged: map[string]bool{}, added: map[string]bool{}, removed: map[string]bool{},
	}
	w.events = instance.Subscribe(w.note)
	if err := w.watch(dir, "."); err != nil {
		w.Close()
		return nil, err
	}
	w.lookAtAll()
	return w, nil
}

// Close ends a Watcher that is not run.
func (w *Watcher) Close() { w.events.Close() }

// note keeps an event for Run.
func (w *Watcher) note(e inotify.Event) {
	w.mu.Lock()
	switch {
	case w.lost:
	case e.Mask&unix.IN_Q_OVERFLOW != 0 || len(w.queue) == maxQueued:
		w.lost, w.queue = true, nil
	default:
		w.queue = append(w.queue, e)
	}
	w.mu.Unlock()
	select {
	case w.ready <- struct{}{}:
	default: // it has still to look
	}
}

// Run reports changes until ctx ends, each when it is there, and closes the Watcher.
func (w *Watcher) Run(ctx context.Context, report func(Change)) {
	defer w.Close()
	for {
		var due <-chan time.Time
		if at := w.next(); !at.IsZero() {
			due = time.After(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return
		case <-w.ready:
			w.apply()
		case <-due:
		}
		w.lookAgain(time.Now())
		if c := w.take(); len(c.Added)+len(c.Removed) > 0 {
			report(c)
		}
	}
}

// take returns what has changed.
func (w *Watcher) take() Change {
	var c Change
	for name := range w.added {
		c.Added = append(c.Added, name)
	}
	for name := range w.removed {
		c.Removed = append(c.Removed, name)
	}
	clear(w.added)
	clear(w.removed)
	slices.Sort(c.Added)
	slices.Sort(c.Removed)
	return c
}

// apply sees to the events that have come.
func (w *Watcher) apply() {
	w.mu.Lock()
	events, lost := w.queue, w.lost
	w.queue, w.lost = nil, false
	w.mu.Unlock()
	if lost {
		w.lookAtAll()
		return
	}
	for _, e := range events {
		dir, known := w.dirs[e.Watch]
		switch name := path.Join(dir, e.Name); {
		case !known:
		case e.Mask&unix.IN_IGNORED != 0: // the directory is gone
			w.leave(dir)
		case e.Name == "":
		case e.Mask&unix.IN_ISDIR != 0:
			w.directory(dir, name, e.Mask)
		case e.Mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
			w.drop(name)
		case e.Mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
			w.appeared(name)
		default: // its mode or owner
			if _, known := w.socks[name]; known {
				w.look(name)
			}
		}
	}
}

// directory sees to an event of a directory in one that is followed.
func (w *Watcher) directory(dir, name string, mask uint32) {
	if mask&unix.IN_ATTRIB != 0 {
		return
	}
	w.leave(name) // gone, or another of that name
	if dir == "." && mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 {
		w.follow(name)
	}
}

// lookAtAll begins, or begins anew where events were lost.
func (w *Watcher) lookAtAll() {
	before := w.socks
	w.socks = map[string]bool{}
	clear(w.again)
	for dir, watch := range w.watches {
		if dir != "." {
			w.forget(dir, watch)
		}
	}
	w.scan(".")
	for _, dir := range w.find() {
		w.follow(dir)
	}
	for name, was := range before {
		if was && !w.socks[name] {
			w.removed[name] = true
		}
	}
}

// appeared looks at what may be a new socket, now and perhaps once more.
func (w *Watcher) appeared(name string) {
	w.look(name)
	if isBound, known := w.socks[name]; known && !isBound {
		w.again[name] = time.Now().Add(boundWithin)
	}
}

// next is when to look at something once more; zero: never.
func (w *Watcher) next() time.Time {
	var next time.Time
	for _, at := range w.again {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return next
}

// lookAgain looks at what is due.
func (w *Watcher) lookAgain(now time.Time) {
	for name, at := range w.again {
		if !at.After(now) {
			delete(w.again, name)
			w.look(name)
		}
	}
}

// look sees whether there is a socket, and a process bound to it.
func (w *Watcher) look(name string) {
	isSocket, isBound := w.kind(name)
	if !isSocket {
		w.drop(name)
		return
	}
	was, known := w.socks[name]
	if !known && len(w.socks) >= maxKnown {
		w.tell("a directory of the host holds more sockets than are followed: connections to the others are refused", "max", maxKnown)
		return
	}
	w.socks[name] = isBound
	switch {
	case isBound:
		w.added[name] = true
		delete(w.again, name)
	case was:
		delete(w.added, name)
		w.removed[name] = true
	}
}

// drop forgets a socket.
func (w *Watcher) drop(name string) {
	if w.socks[name] {
		delete(w.added, name)
		w.removed[name] = true
	}
	delete(w.socks, name)
	delete(w.again, name)
}

// follow watches a directory, and looks for sockets in it.
func (w *Watcher) follow(name string) {
	if len(w.watches) >= maxDirs {
		w.tell("a directory of the host holds more directories than are followed: sockets in the others are out of reach", "max", maxDirs)
		return
	}
	f := w.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if f == nil {
		return
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := w.watch(f, name); err != nil {
		w.tell("sockets of the host in some directories are out of reach", "err", err)
		return
	}
	w.scan(name)
}

func (w *Watcher) watch(dir *os.File, name string) error {
	watch, err := w.events.Add(int(dir.Fd()), watchMask)
	if err != nil {
		return err
	}
	if old, twice := w.dirs[watch]; twice { // moved within, or mounted twice
		delete(w.watches, old)
	}
	w.watches[name], w.dirs[watch] = watch, name
	return nil
}

// scan looks at the sockets in a directory that is watched.
func (w *Watcher) scan(dir string) {
	w.list(dir, func(e fs.DirEntry) {
		if e.Type()&fs.ModeSocket != 0 {
			w.appeared(path.Join(dir, e.Name()))
		}
	})
}

// leave forgets a directory and all below it.
func (w *Watcher) leave(name string) {
	below := func(p string) bool { return p == name || strings.HasPrefix(p, name+"/") || name == "." }
	for dir, watch := range w.watches {
		if below(dir) {
			w.forget(dir, watch)
		}
	}
	for sock := range w.socks {
		if below(sock) {
			w.drop(sock)
		}
	}
}

func (w *Watcher) forget(dir string, watch int32) {
	w.events.Remove(watch)
	delete(w.watches, dir)
	delete(w.dirs, watch)
}

// tell logs something once.
func (w *Watcher) tell(what string, args ...any) {
	if !w.logged[what] {
		w.logged[what] = true
		w.log.Info(what, append([]any{"directory", w.root.Name()}, args...)...)
	}
}
