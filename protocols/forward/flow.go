package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// MaxFrame is the size in bytes of the largest frame, and so of a datagram.
	MaxFrame = 1<<16 - 1
	// copyBuffer is what one direction of a TCP flow holds in memory, in bytes.
	copyBuffer = 16 << 10
)

// AppendFrame appends data, at most MaxFrame bytes, as a frame to b.
func AppendFrame(b, data []byte) ([]byte, error) {
	if len(data) > MaxFrame {
		return b, fmt.Errorf("send frame: %d bytes, at most %d", len(data), MaxFrame)
	}
	return append(binary.BigEndian.AppendUint16(b, uint16(len(data))), data...), nil
}

// A FrameReader reads the frames of a connection.
type FrameReader struct {
	r   *bufio.Reader
	buf []byte
}

// NewFrameReader returns a reader of what follows the handshake on r.
func NewFrameReader(r io.Reader) *FrameReader {
	return &FrameReader{r: bufio.NewReader(r)}
}

// Next returns the next frame, which may be empty and is valid until the next
// call; io.EOF after the last, io.ErrUnexpectedEOF within one.
func (f *FrameReader) Next() ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(f.r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if cap(f.buf) < n {
		f.buf = make([]byte, n)
	}
	if _, err := io.ReadFull(f.r, f.buf[:n]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return f.buf[:n], nil
}

// Copy carries a stream between carrier, the connection between host and guest
// after the handshake, and conn, each way until its end, and closes both. The end
// of one is a half-close of the other (conn's method CloseWrite). A write that
// blocks is the back-pressure. When either breaks, or ctx ends, conn is reset
// where it can be (SetLinger), so that its peer does not take what it has got for
// the whole.
//
// Of a unix socket the kernel tells a peer that has closed from one that has
// half-closed: then the flow ends at once, and not with the next write.
func Copy(ctx context.Context, carrier, conn net.Conn) {
	f := &flow{carrier: carrier, conn: conn}
	stop := context.AfterFunc(ctx, f.reset)
	defer stop()
	var out sync.WaitGroup
	out.Go(f.send)
	f.receive()
	out.Wait()
	f.reset() // of what has ended this is the close alone
}

// A flow is one Copy.
type flow struct {
	carrier, conn net.Conn

	mu             sync.Mutex
	broken         bool // conn takes no more
	sending        bool // of the empty frame has begun: the peer may have it
	sent, received bool // the empty frame was
}

// send copies conn to the carrier.
func (f *flow) send() {
	buf := make([]byte, 2+copyBuffer)
	for {
		n, err := f.conn.Read(buf[2:])
		if n > 0 {
			binary.BigEndian.PutUint16(buf, uint16(n))
			if _, werr := f.carrier.Write(buf[:2+n]); werr != nil {
				f.reset()
				return
			}
		}
		if errors.Is(err, io.EOF) {
			if err = f.sendEnd(); err == nil {
				if hungUp(f.conn) {
					f.reset()
				}
				return
			}
		}
		if err != nil {
			f.reset()
			return
		}
	}
}

// receive copies the carrier to conn. It reads on after the empty frame: only so
// it sees that the peer has gone.
func (f *flow) receive() {
	frames := NewFrameReader(f.carrier)
	var ended, broken bool // broken: the rest is read into nothing
	for {
		b, err := frames.Next()
		switch {
		case err != nil, ended:
			f.reset()
			return
		case len(b) == 0:
			ended = true
			half, ok := f.conn.(interface{ CloseWrite() error })
			if !ok {
				f.reset()
				return
			}
			half.CloseWrite() //nolint:errcheck // broken: then send sees it
			f.end(&f.received)
		case !broken:
			if _, err := f.conn.Write(b); err != nil {
				broken = true
				if !f.breaks() {
					f.reset()
					return
				}
			}
		}
	}
}

// hungUp waits until the peer of conn, a unix socket that has been read to its end,
// has closed. It is false where conn is closed here first, and at once for any other
// kind of connection. That this end has half-closed as well looks the same, and does
// no harm: then the flow has ended both ways.
func hungUp(conn net.Conn) bool {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		return err != nil && !errors.Is(err, unix.EINTR) || n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return err == nil
}

var errBroken = errors.New("broken")

// sendEnd sends the empty frame, unless conn is broken: a read from it finds the
// end then, too, but that is not its peer's word.
func (f *flow) sendEnd() error {
	f.mu.Lock()
	broken := f.broken
	f.sending = !broken
	f.mu.Unlock()
	if broken {
		return errBroken
	}
	if _, err := f.carrier.Write([]byte{0, 0}); err != nil {
		f.mu.Lock()
		f.sending = false
		f.mu.Unlock()
		return err
	}
	f.end(&f.sent)
	return nil
}

// breaks notes that conn takes no more. What it has sent before may be on its way
// still: send reads that and then resets, or where it has come to the end already
// is not waited for.
func (f *flow) breaks() (wait bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = true
	return !f.sending
}

// end marks one direction as ended. After both the carrier is closed, by either
// side: one does not depend on the other for that.
func (f *flow) end(direction *bool) {
	f.mu.Lock()
	*direction = true
	both := f.sent && f.received
	f.mu.Unlock()
	if both {
		f.carrier.Close()
	}
}

// reset closes both connections, and resets conn unless it has ended both ways.
// It is idempotent.
func (f *flow) reset() {
	f.mu.Lock()
	ended := f.sending && f.received
	f.mu.Unlock()
	if !ended {
		Reset(f.conn)
	}
	f.conn.Close()
	f.carrier.Close()
}

// Reset has the Close of conn, where it is TCP, reset it.
func Reset(conn net.Conn) {
	if tcp, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		tcp.SetLinger(0) //nolint:errcheck // closed already
	}
}
