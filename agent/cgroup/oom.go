package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An OOMWatch watches the memory.events of containers by inotify.
type OOMWatch struct {
	inotify *os.File

	mu         sync.Mutex
	containers map[string]*oomState // by container id
}

type oomState struct {
	watch  int // inotify watch descriptor
	file   string
	killed uint64 // of file, when last taken
}

// NewOOMWatch returns a watch of no container. Run closes it.
func NewOOMWatch() (*OOMWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("start inotify: %w", err)
	}
	return &OOMWatch{inotify: os.NewFile(uintptr(fd), "inotify"), containers: make(map[string]*oomState)}, nil
}

// Add starts watching a container's cgroup. Where it has no memory controller
// there is nothing to watch.
func (o *OOMWatch) Add(id string, cg Dir) {
	s := &oomState{watch: -1, file: filepath.Join(string(cg), "memory.events")}
	raw, err := o.inotify.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { s.watch, err = unix.InotifyAddWatch(int(fd), s.file, unix.IN_MODIFY) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		slog.Warn("no OOM events for a container", "container", id, "err", err)
		return
	}
	o.mu.Lock()
	o.containers[id] = s
	o.mu.Unlock()
}

// Remove forgets a container. The kernel ends the watch with the file.
func (o *OOMWatch) Remove(id string) {
	o.mu.Lock()
	delete(o.containers, id)
	o.mu.Unlock()
}

// Take tells whether processes were killed since the last take.
func (o *OOMWatch) Take(id string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.containers[id]
	if s == nil {
		return false
	}
	b, err := os.ReadFile(s.file) // kernel memory: it does not block
	if err != nil {
		return false
	}
	before := s.killed
	s.killed = oomKills(b)
	return s.killed > before
}

// oomKills returns the count of oom_kill in the content of memory.events.
func oomKills(events []byte) uint64 {
	for line := range bytes.Lines(events) {
		if value, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 64)
			if err == nil {
				return n
			}
		}
	}
	return 0
}

// Run calls changed for each event until ctx ends, and then closes the watch.
func (o *OOMWatch) Run(ctx context.Context, changed func(id string)) error {
	stop := context.AfterFunc(ctx, func() { o.inotify.Close() })
	defer stop()
	buf := make([]byte, 4096)
	for {
		n, err := o.inotify.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read inotify: %w", err)
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			event := (*unix.InotifyEvent)(unsafe.Pointer(&rest[0]))
			if id, ok := o.byWatch(int(event.Wd)); ok {
				changed(id)
			}
			rest = rest[unix.SizeofInotifyEvent+event.Len:]
		}
	}
}

func (o *OOMWatch) byWatch(watch int) (string, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, s := range o.containers {
		if s.watch == watch {
			return id, true
		}
	}
	return "", false
}
