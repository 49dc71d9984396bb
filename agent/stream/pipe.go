package stream

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// pipeSize is the capacity of a pipe to or from a process: a few turns of the
// copier's buffer, so that neither side waits for the other on each.
const pipeSize = 256 << 10

// Conns are the connections of a process's standard streams; nil: none.
type Conns struct {
	Stdin, Stdout, Stderr net.Conn
}

// Close closes those that are there.
func (c Conns) Close() {
	for _, conn := range []net.Conn{c.Stdin, c.Stdout, c.Stderr} {
		if conn != nil {
			conn.Close()
		}
	}
}

// Files are one side of a process's standard streams; nil: none. For a terminal
// Stdin and Stdout are one file.
type Files struct {
	Stdin, Stdout, Stderr *os.File
}

// Close closes those that are there.
func (f Files) Close() {
	for _, file := range []*os.File{f.Stdin, f.Stdout, f.Stderr} {
		if file != nil {
			file.Close()
		}
	}
}

// Pipes makes a pipe for every connection that is there: child is the process's
// side, local the other.
func Pipes(c Conns) (child, local Files, err error) {
	for _, p := range []struct {
		conn net.Conn
		r, w **os.File
	}{
		{c.Stdin, &child.Stdin, &local.Stdin},
		{c.Stdout, &local.Stdout, &child.Stdout},
		{c.Stderr, &local.Stderr, &child.Stderr},
	} {
		if p.conn == nil {
			continue
		}
		if *p.r, *p.w, err = os.Pipe(); err != nil {
			child.Close()
			local.Close()
			return Files{}, Files{}, fmt.Errorf("make pipe: %w", err)
		}
		if raw, err := (*p.r).SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { //nolint:errcheck // the default size does as well
				unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) //nolint:errcheck // likewise
			})
		}
	}
	return child, local, nil
}
