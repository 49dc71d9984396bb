package copies

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// watched are the changes that make a copy out of date, of a directory's entries
// and of a file itself.
const watched = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

// A Watcher tells copies of changes on the host. A sandbox has one for all of its
// copies: the host has few inotify instances, 128 for root by default.
type Watcher struct {
	file *os.File
	done chan struct{} // closed when run has ended

	// mu guards wds, and is held while a watch is added or removed, so that both
	// are of one mind; that does not block.
	mu  sync.Mutex
	wds map[int32]map[*Copy]struct{}
}

// NewWatcher returns a Watcher, to be closed after the copies that use it.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		err = fmt.Errorf("the host has no inotify instance left, raise the sysctl fs.inotify.max_user_instances: %w", errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return nil, fmt.Errorf("watch files: %w", err)
	}
	w := &Watcher{
		file: os.NewFile(uintptr(fd), "inotify"),
		done: make(chan struct{}),
		wds:  make(map[int32]map[*Copy]struct{}),
	}
	go w.run()
	return w, nil
}

// Close ends all watches. It is idempotent.
func (w *Watcher) Close() error {
	err := w.file.Close()
	<-w.done
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// run reads events until the file is closed.
func (w *Watcher) run() {
	defer close(w.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			return
		}
		w.tell(buf[:n])
	}
}

// tell wakes the copies that events are about: all of them where events were lost.
func (w *Watcher) tell(events []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		length := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[min(len(events), unix.SizeofInotifyEvent+length):]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			for _, copies := range w.wds {
				wake(copies)
			}
		case mask&unix.IN_IGNORED != 0: // what was watched is gone
			delete(w.wds, wd)
		default:
			wake(w.wds[wd])
		}
	}
}

func wake(copies map[*Copy]struct{}) {
	for c := range copies {
		select {
		case c.changed <- struct{}{}:
		default: // it has still to look
		}
	}
}

// add has c told of changes to what fd is of. Where it is told so already that is
// the same watch.
func (w *Watcher) add(c *Copy, fd int) (wd int32, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	conn, err := w.file.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := conn.Control(func(inotify uintptr) {
		var n int
		n, err = unix.InotifyAddWatch(int(inotify), proc(fd), watched)
		wd = int32(n)
	})
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("the host has no inotify watch left, raise the sysctl fs.inotify.max_user_watches: %w", errdefs.ErrResourceExhausted)
	}
	if err := errors.Join(cerr, err); err != nil {
		return 0, fmt.Errorf("watch: %w", err)
	}
	if w.wds[wd] == nil {
		w.wds[wd] = make(map[*Copy]struct{})
	}
	w.wds[wd][c] = struct{}{}
	return wd, nil
}

// remove ends what add has begun. The watch goes with the last copy that has it.
func (w *Watcher) remove(c *Copy, wd int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	copies := w.wds[wd]
	if copies == nil {
		return
	}
	delete(copies, c)
	if len(copies) > 0 {
		return
	}
	delete(w.wds, wd)
	conn, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	conn.Control(func(inotify uintptr) { //nolint:errcheck // closed: then the watch is gone too
		unix.InotifyRmWatch(int(inotify), uint32(wd)) //nolint:errcheck // gone with what was watched
	})
}

// proc leads to what a descriptor is of, whatever has become of its name, and in
// whatever mount namespace it is.
func proc(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
