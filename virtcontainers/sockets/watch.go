package sockets

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxDepth is how deep below its directory a Watcher looks, and maxWatched at how
	// many directories and sockets.
	maxDepth   = 3
	maxWatched = 1000
	// watchMask: what appears, goes, or gets another mode or owner.
	watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB |
		unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK
)

// A Change is what has become of the sockets of a directory: their paths, relative
// and clean, in lexical order. One that was replaced by another, or has another mode
// or owner, is in Added again.
type Change struct{ Added, Removed []string }

// A Watcher follows the sockets in a directory of the host and in those below it, by
// inotify. Symbolic links are not followed: what one leads to within the directory
// is seen at its own place.
type Watcher struct {
	root   *os.File
	queue  *os.File // the inotify instance
	log    *slog.Logger
	depths map[string]int32 // watch of each directory; "." is the root
	dirs   map[int32]string // and back
	socks  map[string]bool
	full   bool // and that was logged

	// What has changed since it was last told.
	added, removed map[string]bool
}

// Watch begins to follow the sockets of dir, an O_PATH file that stays the caller's
// and open until Run has returned. It also returns those that are there. Either Run
// or Close has to be called.
func Watch(dir *os.File, log *slog.Logger) (*Watcher, []string, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, nil, fmt.Errorf("watch %s for sockets: %w", dir.Name(), os.NewSyscallError("inotify_init1", err))
	}
	w := &Watcher{
		root: dir, queue: os.NewFile(uintptr(fd), "inotify"), log: log,
		depths: map[string]int32{}, dirs: map[int32]string{}, socks: map[string]bool{},
		added: map[string]bool{}, removed: map[string]bool{},
	}
	if err := w.enter("."); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("watch %s for sockets: %w", dir.Name(), err), w.queue.Close())
	}
	return w, w.take().Added, nil
}

// Close ends a Watcher that is not run.
func (w *Watcher) Close() error { return w.queue.Close() }

// Run reports changes until ctx ends, each when it is there, and closes the Watcher.
// The error says why it cannot go on.
func (w *Watcher) Run(ctx context.Context, report func(Change)) error {
	stop := context.AfterFunc(ctx, func() { w.queue.Close() }) //nolint:errcheck // a read of it fails then
	defer stop()
	defer w.queue.Close() //nolint:errcheck // likewise
	buf := make([]byte, 64<<10)
	for {
		n, err := w.queue.Read(buf)
		if err == nil {
			err = w.apply(buf[:n])
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch %s for sockets: %w", w.root.Name(), err)
		}
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

// apply reads events: watch[4] mask[4] cookie[4] length[4] name[length].
func (w *Watcher) apply(events []byte) error {
	for len(events) >= unix.SizeofInotifyEvent {
		watch := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		size := int(binary.NativeEndian.Uint32(events[12:]))
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size]), "\x00")
		events = events[unix.SizeofInotifyEvent+size:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			if err := w.again(); err != nil {
				return err
			}
			continue
		}
		dir, known := w.dirs[watch]
		switch {
		case !known:
		case mask&unix.IN_IGNORED != 0: // the directory is gone
			w.leave(dir)
		case name != "":
			if err := w.look(path.Join(dir, name), mask); err != nil {
				return err
			}
		}
	}
	return nil
}

// again looks at everything anew: events were lost.
func (w *Watcher) again() error {
	for name := range w.socks {
		w.drop(name)
	}
	for name, watch := range w.depths {
		if name != "." {
			w.forget(name, watch)
		}
	}
	return w.scan(".")
}

// look sees what there is at a path after an event.
func (w *Watcher) look(name string, mask uint32) error {
	if mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0 {
		w.drop(name)
		w.leave(name)
	}
	kind, err := w.kind(name)
	if err != nil || kind != unix.S_IFSOCK {
		w.drop(name)
	}
	switch {
	case err != nil:
		return err
	case kind == unix.S_IFSOCK:
		w.add(name)
	case kind == unix.S_IFDIR && mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		w.leave(name) // another of that name
		return w.enter(name)
	}
	return nil
}

// kind is the file type at a path, 0 where there is nothing, or nothing that can be
// reached without a symbolic link.
func (w *Watcher) kind(name string) (uint32, error) {
	f, err := w.open(name)
	if f == nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return st.Mode & unix.S_IFMT, nil
}

// open opens a path below the root; nil where that does not lead anywhere.
func (w *Watcher) open(name string) (*os.File, error) {
	fd, err := unix.Openat2(int(w.root.Fd()), name, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	for _, gone := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EACCES, unix.EXDEV, unix.EAGAIN} {
		if errors.Is(err, gone) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, os.NewSyscallError("openat2", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// enter watches a directory and what is in it already, unless it is too deep.
func (w *Watcher) enter(name string) error {
	if name != "." && strings.Count(name, "/") >= maxDepth || w.isFull() {
		return nil
	}
	f, err := w.open(name)
	if f == nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	var watch int
	cerr := w.control(func(fd int) {
		watch, err = unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), watchMask)
	})
	if cerr != nil {
		return cerr
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return nil
	}
	if errors.Is(err, unix.ENOSPC) {
		return errors.New("too many inotify watches on the host: raise fs.inotify.max_user_watches")
	}
	if err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	if old, twice := w.dirs[int32(watch)]; twice { // moved within, or mounted twice
		delete(w.depths, old)
	}
	w.depths[name], w.dirs[int32(watch)] = int32(watch), name
	return w.scan(name)
}

// control calls f with the inotify instance, which another goroutine may close.
func (w *Watcher) control(f func(fd int)) error {
	raw, err := w.queue.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// scan looks at what is in a directory that is watched.
func (w *Watcher) scan(name string) error {
	f, err := w.open(name)
	if f == nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	entries, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		switch below := path.Join(name, e.Name()); {
		case e.Type()&fs.ModeSocket != 0:
			w.add(below)
		case e.IsDir():
			if err := w.enter(below); err != nil {
				return err
			}
		}
	}
	return nil
}

// leave forgets a directory and all below it.
func (w *Watcher) leave(name string) {
	below := func(p string) bool { return p == name || strings.HasPrefix(p, name+"/") || name == "." }
	for dir, watch := range w.depths {
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
	w.control(func(fd int) { //nolint:errcheck // closed, and every watch with it
		unix.InotifyRmWatch(fd, uint32(watch)) //nolint:errcheck // the directory may be gone
	})
	delete(w.depths, dir)
	delete(w.dirs, watch)
}

func (w *Watcher) add(name string) {
	if !w.socks[name] && w.isFull() {
		return
	}
	w.socks[name], w.added[name] = true, true
}

func (w *Watcher) drop(name string) {
	if w.socks[name] {
		delete(w.socks, name)
		delete(w.added, name)
		w.removed[name] = true
	}
}

// isFull tells, and logs once, that there is more than is followed.
func (w *Watcher) isFull() bool {
	if len(w.depths)+len(w.socks) < maxWatched {
		return false
	}
	if !w.full {
		w.full = true
		w.log.Warn("a directory of the host holds more directories and sockets than are followed: connections to the others are refused",
			"directory", w.root.Name(), "max", maxWatched)
	}
	return true
}
