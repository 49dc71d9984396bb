package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What is in a directory on which serve and use meet.
const (
	socketName = "socket" // answers each line
	fifoName   = "fifo"   // takes a line, whose answer is a file of that name
	flockName  = "flock"  // is locked by flock
	posixName  = "posix"  // is locked by fcntl
)

// patience is for what does not come.
const patience = time.Minute

// serve prints "serving" when all directories are ready, and does not end.
func serve(dirs []string) error {
	failed := make(chan error)
	for _, dir := range dirs {
		locked, err := lock(dir)
		if err != nil {
			return err
		}
		defer runtime.KeepAlive(locked) // or they would be closed
		fifo := filepath.Join(dir, fifoName)
		if err := unix.Mkfifo(fifo, 0o666); err != nil {
			return fmt.Errorf("make fifo %s: %w", fifo, err)
		}
		l, err := net.Listen("unix", filepath.Join(dir, socketName))
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, dir) }() // ends with the process
		go func() { failed <- answerFIFO(fifo, dir) }()
	}
	fmt.Println("serving")
	return <-failed
}

// lock locks a directory's files until they are closed.
func lock(dir string) (locked []*os.File, err error) {
	for _, name := range []string{flockName, posixName} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if name == flockName {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		} else {
			err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		}
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		locked = append(locked, f)
	}
	return locked, nil
}

func accept(l net.Listener, dir string) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with the peer
			defer conn.Close()
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				fmt.Fprintln(conn, answer(dir, lines.Text()))
			}
		}()
	}
}

// answer makes a file where it is asked to, and otherwise says the same.
func answer(dir, line string) string {
	name, ok := strings.CutPrefix(line, "make ")
	if !ok {
		return line
	}
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		return err.Error()
	}
	f.Close() // nothing was written
	return "made"
}

func answerFIFO(fifo, dir string) error {
	for {
		f, err := os.Open(fifo)
		if err != nil {
			return err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if got := answer(dir, "make "+lines.Text()); got != "made" {
				return errors.New(got)
			}
		}
		f.Close()
	}
}

// use meets serve on a directory, which may be read-only here.
func use(dir string) error {
	w, err := newWatcher(dir)
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", filepath.Join(dir, socketName))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	lines := bufio.NewScanner(conn)
	ask := func(line, want string) error {
		fmt.Fprintln(conn, line)
		if lines.Scan(); lines.Text() != want {
			return fmt.Errorf("socket: asked %q: %q, %v", line, lines.Text(), lines.Err())
		}
		return nil
	}
	if err := ask("hello", "hello"); err != nil {
		return err
	}
	// Two names, for a name that is there already makes no event.
	bySocket, byFIFO := fmt.Sprint("by-socket-", time.Now().UnixNano()), fmt.Sprint("by-fifo-", time.Now().UnixNano())
	if err := ask("make "+bySocket, "made"); err != nil {
		return err
	}
	if err := w.wait(bySocket); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	fifo, err := os.OpenFile(filepath.Join(dir, fifoName), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(fifo, byFIFO)
	if err = errors.Join(err, fifo.Close(), w.wait(byFIFO)); err != nil {
		return fmt.Errorf("fifo: %w", err)
	}
	if err := wantLocked(dir); err != nil {
		return err
	}
	fmt.Println(dir, "works")
	return nil
}

// wait is the next event's, which is of name.
func (w *watcher) wait(name string) error {
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, int(patience.Milliseconds())); len(w.rest) == 0 && n != 1 {
		return fmt.Errorf("no event of %s in %v: %w", name, patience, err)
	}
	_, got, err := w.next()
	if err == nil && got != name {
		err = fmt.Errorf("event of %s, want %s", got, name)
	}
	return err
}

// wantLocked wants the locks held by another.
func wantLocked(dir string) error {
	f, err := os.Open(filepath.Join(dir, flockName))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("flock of what another has locked: %w", err)
	}
	p, err := os.Open(filepath.Join(dir, posixName))
	if err != nil {
		return err
	}
	defer p.Close()
	query := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(p.Fd(), unix.F_GETLK, &query); err != nil || query.Type != unix.F_WRLCK {
		return fmt.Errorf("lock of what another has locked: type %d, %w", query.Type, err)
	}
	return nil
}
