package stream

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bufferSize is what one read takes at most: whole pages, and with the
	// header of a multiplexer within two of virtio-serial's largest writes.
	bufferSize = 60 << 10
	// Patience is how long an exit waits for a host that reads nothing.
	Patience = 5 * time.Second
)

// A Copier copies between a process's standard streams and their connections.
//
//	stdin   connection -> pipe or terminal; at EOF the pipe is closed, a
//	        terminal stays open; where the process has closed its end, the
//	        connection is closed
//	stdout  pipe or terminal -> connection; at EOF (no process has the other
//	stderr  end open any more) the connection is half-closed, and closed once
//	        the host has closed it; where the host closes it first, a pipe is
//	        closed and a terminal read on into nothing, so that the process
//	        never blocks for ever
//
// A write that blocks is the back-pressure, either way.
type Copier struct {
	in       *input
	out, err *output
	copying  sync.WaitGroup
}

// Copy starts copying. The Copier owns files and connections from here on and
// closes each as soon as it is done with it, the last in Close.
func Copy(local Files, c Conns, terminal bool) *Copier {
	k := &Copier{}
	if local.Stdin != nil && c.Stdin != nil {
		k.in = &input{conn: c.Stdin, file: local.Stdin, terminal: terminal}
		k.copying.Go(k.in.copy)
	}
	if local.Stdout != nil {
		k.out = newOutput(local.Stdout, c.Stdout, terminal)
		k.copying.Go(k.out.copy)
	}
	if local.Stderr != nil {
		k.err = newOutput(local.Stderr, c.Stderr, terminal)
		k.copying.Go(k.err.copy)
	}
	return k
}

// Drain is called once the process has ended. It returns when all that the
// process itself wrote is in the connections, or when a host that reads nothing
// has made no progress for patience, and tells how many bytes each holds by
// then. Stdin is closed. A descendant that has inherited the streams does not
// delay it: its output is copied on until EOF.
func (k *Copier) Drain(patience time.Duration) (stdout, stderr uint64) {
	if k.in != nil {
		k.in.close()
	}
	for _, o := range []*output{k.out, k.err} { // both at once
		if o != nil {
			o.flush()
		}
	}
	var both sync.WaitGroup
	both.Go(func() { stderr = k.err.wait(patience) })
	stdout = k.out.wait(patience)
	both.Wait()
	return stdout, stderr
}

// Close ends all copying, losing what has not been copied, and returns when
// every file and connection is closed.
func (k *Copier) Close() {
	if k.in != nil {
		k.in.close()
	}
	for _, o := range []*output{k.out, k.err} {
		if o != nil {
			o.close()
		}
	}
	k.copying.Wait()
}

// input copies a connection to the process's stdin.
type input struct {
	conn     net.Conn
	file     *os.File
	terminal bool // file is the output's too, and stays open
}

func (i *input) copy() {
	buf := make([]byte, bufferSize)
	for {
		n, err := i.conn.Read(buf)
		if n > 0 {
			if _, werr := i.file.Write(buf[:n]); werr != nil {
				break // nobody reads stdin any more
			}
		}
		if err != nil {
			break
		}
	}
	i.close()
}

func (i *input) close() {
	i.conn.Close()
	if !i.terminal {
		i.file.Close()
	}
}

// output copies one output stream of the process to a connection.
type output struct {
	file     *os.File
	conn     net.Conn // nil: the output is read into nothing
	terminal bool
	sent     atomic.Uint64 // bytes in the connection
	exited   atomic.Bool   // the process has ended: report when empty
	empty    chan struct{} // closed when, after the end, all was copied
	once     sync.Once
}

func newOutput(file *os.File, conn net.Conn, terminal bool) *output {
	return &output{file: file, conn: conn, terminal: terminal, empty: make(chan struct{})}
}

func (o *output) copy() {
	var watch sync.WaitGroup
	if o.conn != nil {
		watch.Go(o.watchHost)
	}
	o.copyBytes()
	o.file.Close()
	o.isEmpty()
	if o.conn == nil {
		return
	}
	// The host closes the connection when it has read to the end: closing it
	// here first could cut off what is still under way.
	half, ok := o.conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		o.conn.Close()
	}
	watch.Wait()
	o.conn.Close()
}

// watchHost waits until the host closes its end, and then lets nothing block on
// it any more. It ends with the connection.
func (o *output) watchHost() {
	io.Copy(io.Discard, o.conn) //nolint:errcheck // until closed, by either side
	o.conn.Close()
	if !o.terminal {
		o.file.Close()
	}
}

func (o *output) copyBytes() {
	raw, err := o.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, bufferSize)
	discard := o.conn == nil
	for {
		n, err := o.read(raw, buf)
		if errors.Is(err, os.ErrDeadlineExceeded) { // flush woke the read
			o.file.SetReadDeadline(time.Time{}) //nolint:errcheck // it could be set
			continue
		}
		if n <= 0 || err != nil {
			return // all writers are gone, or Close
		}
		if discard {
			continue
		}
		m, err := o.conn.Write(buf[:n])
		o.sent.Add(uint64(m))
		if err != nil { // the host is gone
			if !o.terminal {
				return
			}
			discard = true
		}
	}
}

// read reads once, and reports the stream empty when the process has ended and
// nothing is left. The kernel makes that exact: what a process wrote is in the
// pipe when it has ended, and reading a terminal's master pushes what its
// slave's line discipline still holds before it finds nothing.
func (o *output) read(raw syscall.RawConn, buf []byte) (n int, err error) {
	rerr := raw.Read(func(fd uintptr) bool {
		for {
			exited := o.exited.Load() // before the read: see flush
			n, err = unix.Read(int(fd), buf)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN:
				if exited {
					o.isEmpty()
				}
				return false
			}
			return true
		}
	})
	if rerr != nil {
		return 0, rerr
	}
	return n, err
}

func (o *output) isEmpty() { o.once.Do(func() { close(o.empty) }) }

// flush has the copier report when it next finds the stream empty. A read that
// waits already is woken by a deadline in the past.
func (o *output) flush() {
	o.exited.Store(true)
	o.file.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // closed: then it is empty
}

// wait returns the number of bytes sent once the stream is empty, or once no
// byte has been sent for patience.
func (o *output) wait(patience time.Duration) uint64 {
	if o == nil {
		return 0
	}
	sent := o.sent.Load()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		select {
		case <-o.empty:
			return o.sent.Load()
		case <-timer.C:
		}
		if now := o.sent.Load(); now != sent {
			sent = now
			timer.Reset(patience)
			continue
		}
		return sent
	}
}

func (o *output) close() {
	o.file.Close()
	if o.conn != nil {
		o.conn.Close()
	}
}
