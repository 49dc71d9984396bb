// Package reap owns the processes that the agent starts and collects the
// orphans that fall to it as PID 1.
//
// An owned process is waited for by its pidfd through the runtime's poller: one
// goroutine each, no thread. All other children are orphans, leftovers whose
// parent has died, and Collect reaps them when SIGCHLD tells of one. Between a
// fork and the registration of the pids that come of it (the child's own, and
// those which an OCI runtime leaves behind and names in a file) the two cannot
// be told apart: such a start is announced by Begin, and while one is under way
// nothing is collected, so no status is lost. Starts never wait for anything.
package reap

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Table holds the owned processes of this program. The zero value is not
// usable; see New.
type Table struct {
	poke chan struct{} // wakes Collect; capacity 1

	mu     sync.Mutex
	owned  map[int]*Process // by pid
	starts int              // between Begin and its end
}

// New returns an empty table.
func New() *Table {
	return &Table{poke: make(chan struct{}, 1), owned: make(map[int]*Process)}
}

// An Exit tells how a process ended.
type Exit struct {
	// Status is 0..255: 128+n for death by signal n.
	Status int
	// At is when the end was seen.
	At time.Time
}

// A Process is one owned process. Its methods are safe for concurrent use.
type Process struct {
	pid  int
	fd   *os.File // pidfd
	done chan struct{}
	exit Exit
}

// PID returns the process id. It may belong to another process after Done.
func (p *Process) PID() int { return p.pid }

// Done is closed once the process has ended and has been reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit tells how the process ended; it is valid after Done.
func (p *Process) Exit() Exit { return p.exit }

// Signal sends sig by pidfd, so it cannot reach another process. It fails with
// os.ErrProcessDone after the end.
func (p *Process) Signal(sig syscall.Signal) error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return os.ErrProcessDone
	}
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return os.ErrProcessDone // closed after the end
	}
	switch {
	case errors.Is(serr, unix.ESRCH):
		return os.ErrProcessDone
	case serr != nil:
		return fmt.Errorf("signal process %d: %w", p.pid, serr)
	}
	return nil
}

// Begin announces that processes are being started whose pids will be known
// later. The caller calls Own for each and then end, once.
func (t *Table) Begin() (end func()) {
	t.mu.Lock()
	t.starts++
	t.mu.Unlock()
	return func() {
		t.mu.Lock()
		t.starts--
		t.mu.Unlock()
		t.wake()
	}
}

// Start starts cmd and owns its process. The caller must not call cmd.Wait:
// after Done it has been called, and cmd.ProcessState is set.
func (t *Table) Start(cmd *exec.Cmd) (*Process, error) {
	defer t.Begin()()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return t.own(cmd.Process.Pid, func(int) Exit {
		cmd.Wait() //nolint:errcheck // the status is what counts
		return Exit{Status: code(cmd.ProcessState), At: time.Now()}
	})
}

// Own takes over a child that something else has forked. It is called between
// Begin and its end, so that even a child which has ended already has its
// status read here.
func (t *Table) Own(pid int) (*Process, error) { return t.own(pid, reapFD) }

// own registers pid and starts the goroutine that waits for it. The goroutine
// ends when the process does.
func (t *Table) own(pid int, reap func(fd int) Exit) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("wait for process %d: %w", pid, err)
	}
	p := &Process{pid: pid, fd: f, done: make(chan struct{})}
	t.mu.Lock()
	t.owned[pid] = p
	t.mu.Unlock()
	go func() {
		err := conn.Read(func(fd uintptr) bool {
			if !ended(int(fd)) {
				return false
			}
			p.exit = reap(int(fd))
			return true
		})
		if err != nil { // a pidfd that cannot be polled
			p.exit = reap(fd)
		}
		t.mu.Lock()
		if t.owned[pid] == p { // else the pid has come round already
			delete(t.owned, pid)
		}
		t.mu.Unlock()
		t.wake() // an orphan may have stood behind this one
		close(p.done)
		f.Close()
	}()
	return p, nil
}

func (t *Table) wake() {
	select {
	case t.poke <- struct{}{}:
	default:
	}
}

// ended tells whether the process of a pidfd can be reaped, without reaping it.
func ended(fd int) bool {
	var info childInfo
	err := waitid(unix.P_PIDFD, fd, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
	return err != nil || info.PID != 0
}

// reapFD reaps the process of a pidfd, waiting for its end.
func reapFD(fd int) Exit {
	var info childInfo
	if err := waitid(unix.P_PIDFD, fd, &info, unix.WEXITED); err != nil {
		return Exit{Status: 255, At: time.Now()} // not our child: nobody can know
	}
	return Exit{Status: info.status(), At: time.Now()}
}

// code is the exit status as a shell tells it.
func code(s *os.ProcessState) int {
	if s == nil {
		return 255
	}
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}
