package container

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A consoleSocket is where an OCI runtime sends the master of a terminal it has
// made. The name of its directory is random, for containers' ids are too long
// for a socket's path.
type consoleSocket struct {
	dir string
	ln  *net.UnixListener
}

func listenConsole(dir string) (*consoleSocket, error) {
	tmp, err := os.MkdirTemp(dir, "tty")
	if err != nil {
		return nil, fmt.Errorf("make console socket: %w", err)
	}
	s := &consoleSocket{dir: tmp}
	s.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.Path(), Net: "unix"})
	if err != nil {
		os.RemoveAll(tmp)
		return nil, fmt.Errorf("make console socket: %w", err)
	}
	return s, nil
}

// Path implements runc.ConsoleSocket.
func (s *consoleSocket) Path() string { return filepath.Join(s.dir, "sock") }

// Close removes the socket.
func (s *consoleSocket) Close() error {
	s.ln.Close()
	return os.RemoveAll(s.dir)
}

// receive returns the master that the runtime has sent, set to a size. The
// runtime has exited, so what it sent is there already: nothing to wait for.
func (s *consoleSocket) receive(columns, rows uint16) (*os.File, error) {
	s.ln.SetDeadline(time.Now().Add(time.Second)) //nolint:errcheck // the listener is open
	conn, err := s.ln.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second)) //nolint:errcheck // likewise
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, unix.PathMax), oob)
	if err != nil {
		return nil, fmt.Errorf("receive console: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("receive console: %d control messages, want 1 (%v)", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive console: %d descriptors, want 1 (%v)", len(fds), err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("receive console: %w", err)
	}
	console := os.NewFile(uintptr(fds[0]), "console")
	if columns > 0 && rows > 0 {
		if err := Resize(console, columns, rows); err != nil {
			console.Close()
			return nil, err
		}
	}
	return console, nil
}

// Resize sets the size of a terminal, given its master, in character cells.
func Resize(console *os.File, columns, rows uint16) error {
	raw, err := console.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows})
	})
	if err == nil {
		err = ierr
	}
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}
