// Package inotify is one inotify instance for all who watch files of the host in a
// sandbox: the host has few of them, 128 for root by default.
package inotify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// An Event is one of a watch. Where events were lost there is one with
// IN_Q_OVERFLOW, of no watch; with IN_IGNORED the watch has ended.
type Event struct {
	Watch int32
	Mask  uint32
	Name  string // in the directory that is watched; empty: that itself
}

// An Instance is made in the kernel with its first watch.
type Instance struct {
	// mu is held while a watch is added or removed, so that the kernel and watches
	// are of one mind, and while subscribers are told.
	mu      sync.Mutex
	closed  bool
	file    *os.File      // nil before the first watch
	done    chan struct{} // closed when run has ended
	watches map[int32]map[*Subscriber]uint32
}

// New returns an Instance, to be closed after its subscribers.
func New() *Instance {
	return &Instance{done: make(chan struct{}), watches: map[int32]map[*Subscriber]uint32{}}
}

// Close ends the instance. It is idempotent.
func (i *Instance) Close() error {
	i.mu.Lock()
	file, first := i.file, !i.closed
	i.closed = true
	i.mu.Unlock()
	if file == nil {
		return nil
	}
	var err error
	if first {
		err = file.Close()
	}
	<-i.done
	return err
}

// A Subscriber has watches, and is told of their events.
type Subscriber struct {
	instance *Instance
	tell     func(Event)
}

// Subscribe returns a subscriber without a watch. All that tell may do is to note
// the event: nobody is told of anything before it returns.
func (i *Instance) Subscribe(tell func(Event)) *Subscriber {
	return &Subscriber{instance: i, tell: tell}
}

// Add watches what fd, which may be of O_PATH, is of. What is watched already, by
// whomever, is the same watch; the subscriber is told of the events in the masks that
// it has given. The error is ResourceExhausted where the host allows no more.
func (s *Subscriber) Add(fd int, mask uint32) (watch int32, err error) {
	i := s.instance
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.open(); err != nil {
		return 0, err
	}
	cerr := i.control(func(instance int) {
		// By descriptor: whatever has become of its name, and in whatever mount namespace.
		var n int
		n, err = unix.InotifyAddWatch(instance, fmt.Sprintf("/proc/self/fd/%d", fd), mask|unix.IN_MASK_ADD)
		watch = int32(n)
	})
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("the host has no inotify watch left, raise the sysctl fs.inotify.max_user_watches: %w", errdefs.ErrResourceExhausted)
	}
	if err := errors.Join(cerr, err); err != nil {
		return 0, fmt.Errorf("watch: %w", err)
	}
	if i.watches[watch] == nil {
		i.watches[watch] = map[*Subscriber]uint32{}
	}
	i.watches[watch][s] |= mask
	return watch, nil
}

// open makes the instance.
func (i *Instance) open() error {
	if i.closed {
		return fmt.Errorf("watch files: %w", os.ErrClosed)
	}
	if i.file != nil {
		return nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		err = fmt.Errorf("the host has no inotify instance left, raise the sysctl fs.inotify.max_user_instances: %w", errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return fmt.Errorf("watch files: %w", err)
	}
	i.file = os.NewFile(uintptr(fd), "inotify")
	go i.run(i.file)
	return nil
}

// control calls f with the instance, unless it is closed meanwhile.
func (i *Instance) control(f func(instance int)) error {
	conn, err := i.file.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Control(func(fd uintptr) { f(int(fd)) })
}

// Remove takes a watch back; it goes with its last subscriber. One that has ended is
// no error.
func (s *Subscriber) Remove(watch int32) {
	s.instance.mu.Lock()
	defer s.instance.mu.Unlock()
	s.remove(watch)
}

func (s *Subscriber) remove(watch int32) {
	subscribers := s.instance.watches[watch]
	if _, has := subscribers[s]; !has {
		return
	}
	delete(subscribers, s)
	if len(subscribers) > 0 {
		return
	}
	delete(s.instance.watches, watch)
	s.instance.control(func(instance int) { //nolint:errcheck // closed: then the watch is gone too
		unix.InotifyRmWatch(instance, uint32(watch)) //nolint:errcheck // gone with what was watched
	})
}

// Close takes all watches of the subscriber back. It is told of nothing after that.
func (s *Subscriber) Close() {
	s.instance.mu.Lock()
	defer s.instance.mu.Unlock()
	for watch := range s.instance.watches {
		s.remove(watch)
	}
}

// run reads events until the file is closed.
func (i *Instance) run(file *os.File) {
	defer close(i.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := file.Read(buf)
		if err != nil {
			return
		}
		i.apply(buf[:n])
	}
}

// apply tells of events: watch[4] mask[4] cookie[4] length[4] name[length].
func (i *Instance) apply(events []byte) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		e := Event{Watch: int32(binary.NativeEndian.Uint32(events)), Mask: binary.NativeEndian.Uint32(events[4:])}
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		e.Name = strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		events = events[end:]
		if e.Mask&unix.IN_Q_OVERFLOW != 0 {
			i.lost(e)
			continue
		}
		for s, mask := range i.watches[e.Watch] {
			// Another may have asked for more of the same watch.
			if e.Mask&(mask|unix.IN_IGNORED) != 0 {
				s.tell(e)
			}
		}
		if e.Mask&unix.IN_IGNORED != 0 {
			delete(i.watches, e.Watch)
		}
	}
}

// lost tells every subscriber, once, that events were lost.
func (i *Instance) lost(e Event) {
	told := map[*Subscriber]bool{}
	for _, subscribers := range i.watches {
		for s := range subscribers {
			if !told[s] {
				told[s] = true
				s.tell(e)
			}
		}
	}
}
