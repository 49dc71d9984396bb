// Package socket is the guest's end of the host's unix sockets: a socket here
// stands for each of them, and what connects to it waits to be claimed by the host.
package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// maxSockets bounds the sockets at one time.
	maxSockets = 4096
	// maxPending bounds the connections of one socket that wait for the host.
	// Further ones stay in the kernel's queue, and when that is full connect blocks.
	maxPending = 16
	// claimTimeout is how long a connection waits for the host, which may be at its
	// limit of them.
	claimTimeout = 2 * time.Minute
	// acceptPause is the wait after an accept that has failed, for want of
	// descriptors as a rule: nothing tells when there are some again.
	acceptPause = 100 * time.Millisecond
)

// A Socket is one that stands for a socket of the host.
type Socket struct {
	// ID names it, and is its name in the table's directory.
	ID string
	// Mode, UID and GID are those of the host's.
	Mode, UID, GID uint32
	// Over is a path at which the host's own is seen, and which this one is mounted
	// over; empty: none.
	Over string
}

// A Connection is one that waits to be claimed.
type Connection struct {
	// Socket is the id of the one that was connected to.
	Socket string
	// Number by which to claim it; never used twice by a table.
	Number uint64
	// PID of the process that has connected, which may have ended; 0: not known.
	PID int
}

// A Table holds a guest's sockets. Its methods are safe for concurrent use.
//
//	connect ──> accept ──> pending, reported ──Claim──> the host's
//	                           └──claimTimeout, Close──> closed
type Table struct {
	dir    string
	report func(Connection)
	work   sync.WaitGroup // the acceptors

	// changing orders Listen and Close, which wait for the host's file system.
	changing sync.Mutex
	temp     uint64 // of changing

	// mu guards what is below, and is not held over a call that can block.
	mu      sync.Mutex
	closed  bool
	sockets map[string]*listener
	last    uint64
	pending map[uint64]*pending
}

// A listener is one socket.
type listener struct {
	id   string
	over string // the table's changing guards it
	ln   *net.UnixListener
	room chan struct{} // a slot for each connection that waits
	end  chan struct{} // closed with it
}

// A pending connection waits for its claim.
type pending struct {
	listener *listener
	conn     *net.UnixConn
	timer    *time.Timer
}

// New returns a table without a socket, whose sockets are made in dir. report is
// told of each connection, and does not block; the host claims it by its number.
func New(dir string, report func(Connection)) *Table {
	return &Table{dir: dir, report: report, sockets: map[string]*listener{}, pending: map[uint64]*pending{}}
}

// Listen makes a socket, and mounts it over s.Over, in place of another's. For one
// that is there it sets mode and owner, and mounts it anew where the host's own is
// another file now.
func (t *Table) Listen(s Socket) error {
	t.changing.Lock()
	defer t.changing.Unlock()
	if err := t.listen(s); err != nil {
		return fmt.Errorf("listen on socket %s: %w", s.ID, err)
	}
	return nil
}

func (t *Table) listen(s Socket) error {
	t.mu.Lock()
	old, n, closed := t.sockets[s.ID], len(t.sockets), t.closed
	t.mu.Unlock()
	switch {
	case closed:
		return fmt.Errorf("the guest is going down: %w", errdefs.ErrUnavailable)
	case old == nil && n >= maxSockets:
		return fmt.Errorf("there are %d sockets already: %w", n, errdefs.ErrResourceExhausted)
	}
	path := filepath.Join(t.dir, s.ID)
	if old != nil {
		if err := own(path, s); err != nil {
			return err
		}
		if old.over != "" && old.over != s.Over {
			if err := unmount(path, old.over); err != nil {
				return err
			}
		}
		if old.over != s.Over {
			if err := t.yield(s.Over); err != nil {
				return err
			}
		}
		old.over = s.Over
		return mountOver(path, s.Over)
	}
	ln, err := t.bind(path, s)
	if err != nil {
		return err
	}
	if err = t.yield(s.Over); err == nil {
		err = mountOver(path, s.Over)
	}
	if err != nil {
		return errors.Join(err, ln.Close(), os.Remove(path))
	}
	l := &listener{id: s.ID, over: s.Over, ln: ln, room: make(chan struct{}, maxPending), end: make(chan struct{})}
	t.mu.Lock()
	if closed = t.closed; !closed {
		t.sockets[s.ID] = l
		t.work.Go(func() { t.accept(l) })
	}
	t.mu.Unlock()
	if closed {
		return errors.Join(fmt.Errorf("the guest is going down: %w", errdefs.ErrUnavailable), t.drop(l))
	}
	return nil
}

// yield takes the mount of another socket from a place that is to be this one's.
func (t *Table) yield(over string) error {
	if over == "" {
		return nil
	}
	t.mu.Lock()
	var other *listener
	for _, l := range t.sockets {
		if l.over == over {
			other = l
		}
	}
	t.mu.Unlock()
	if other == nil {
		return nil
	}
	other.over = ""
	return unmount(filepath.Join(t.dir, other.id), over)
}

// bind makes the socket's file. It has another name until it is whole: one short
// enough for an address, and nobody can connect to it before it has its mode.
func (t *Table) bind(path string, s Socket) (*net.UnixListener, error) {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return nil, err
	}
	t.temp++
	temp := filepath.Join(t.dir, "."+strconv.FormatUint(t.temp, 10))
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	err = own(temp, s)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(temp))
	}
	return ln, nil
}

// own gives a socket owner and mode.
func own(path string, s Socket) error {
	if err := os.Lchown(path, int(s.UID), int(s.GID)); err != nil {
		return err
	}
	return unix.Chmod(path, s.Mode) // after the owner, whose change takes bits away
}

// accept takes connections until the socket is closed: one more than there is room
// for waits here.
func (t *Table) accept(l *listener) {
	for {
		conn, err := l.ln.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			slog.Warn("accept at a socket of the host", "socket", l.id, "err", err)
			select {
			case <-time.After(acceptPause):
				continue
			case <-l.end:
				return
			}
		}
		select {
		case l.room <- struct{}{}:
			t.offer(l, conn)
		case <-l.end:
			conn.Close()
			return
		}
	}
}

// offer keeps a connection for the host and tells of it.
func (t *Table) offer(l *listener, conn *net.UnixConn) {
	pid := peer(conn)
	t.mu.Lock()
	if t.sockets[l.id] != l {
		t.mu.Unlock()
		conn.Close()
		return
	}
	t.last++
	number := t.last
	t.pending[number] = &pending{listener: l, conn: conn, timer: time.AfterFunc(claimTimeout, func() {
		if conn, err := t.Claim(number); err == nil {
			slog.Warn("the host has not taken a connection to its socket", "socket", l.id, "timeout", claimTimeout)
			conn.Close()
		}
	})}
	t.mu.Unlock()
	t.report(Connection{Socket: l.id, Number: number, PID: pid})
}

// peer is who has connected, by the kernel's word.
func peer(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	var pid int
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if err != nil {
		return 0
	}
	return pid
}

// Claim hands over the connection of that number, once. The error is ENOENT where
// none waits under it.
func (t *Table) Claim(number uint64) (net.Conn, error) {
	t.mu.Lock()
	p := t.pending[number]
	delete(t.pending, number)
	t.mu.Unlock()
	if p == nil {
		return nil, fmt.Errorf("claim connection %d: %w", number, syscall.ENOENT)
	}
	p.timer.Stop()
	<-p.listener.room
	return p.conn, nil
}

// Close takes a socket away, with the connections that wait. Those that the host
// has claimed are the host's to end, as on a host a connection outlives its
// socket's name. A socket that is not there is no error.
func (t *Table) Close(id string) error {
	t.changing.Lock()
	defer t.changing.Unlock()
	t.mu.Lock()
	l := t.sockets[id]
	t.mu.Unlock()
	if l == nil {
		return nil
	}
	if err := t.drop(l); err != nil {
		return fmt.Errorf("close socket %s: %w", id, err)
	}
	return nil
}

// drop ends a socket, whatever fails. The caller holds changing.
func (t *Table) drop(l *listener) error {
	t.mu.Lock()
	delete(t.sockets, l.id)
	var waiting []*pending
	for number, p := range t.pending {
		if p.listener == l {
			waiting = append(waiting, p)
			delete(t.pending, number)
		}
	}
	t.mu.Unlock()
	close(l.end)
	path := filepath.Join(t.dir, l.id)
	var errs []error
	if l.over != "" {
		errs = append(errs, unmount(path, l.over))
	}
	errs = append(errs, l.ln.Close())
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, p := range waiting {
		p.timer.Stop()
		p.conn.Close()
	}
	return errors.Join(errs...)
}

// Serve keeps the sockets until ctx ends. Then it closes them all and returns when
// nothing is left of them; there can be no other from then on.
func (t *Table) Serve(ctx context.Context) error {
	<-ctx.Done()
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.changing.Lock() // after the last Listen
	defer t.changing.Unlock()
	t.mu.Lock()
	all := make([]*listener, 0, len(t.sockets))
	for _, l := range t.sockets {
		all = append(all, l)
	}
	t.mu.Unlock()
	for _, l := range all {
		if err := t.drop(l); err != nil {
			slog.Debug("close socket", "socket", l.id, "err", err)
		}
	}
	t.work.Wait()
	return nil
}
