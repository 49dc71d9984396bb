package portmux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// The header of a yamux frame: version, type, flags[2], stream[4], length[4].
const (
	headerLen = 12

	typeData   = 0
	typeWindow = 1
)

// A wire stands between yamux and the carrier. It lets in only what the other
// end of this package sends; it sends a frame in one write; and when the carrier
// ends it parks yamux instead of telling it, for yamux would mark every stream
// as ended, and a connection cut short would read like one that was complete.
type wire struct {
	conn io.ReadWriteCloser
	fail func(error) // told once or more often why the carrier is of no use

	closed    chan struct{}
	closeOnce sync.Once
	closeErr  error

	// Of the one goroutine that reads.
	header [headerLen]byte
	have   int    // bytes of header
	body   uint32 // bytes of the frame's body to come
	heard  chan struct{}
	spoken bool // heard is closed

	// Of the one goroutine that writes.
	out  []byte // a data frame's header, waiting for its body
	lost bool   // a write has failed
}

func newWire(conn io.ReadWriteCloser, fail func(error)) *wire {
	return &wire{conn: conn, fail: fail, closed: make(chan struct{}), heard: make(chan struct{})}
}

// Read returns io.EOF only after Close.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.conn.Read(p)
	if err == nil {
		if err = w.inspect(p[:n]); err == nil {
			return n, nil
		}
	} else if errors.Is(err, io.EOF) {
		err = fmt.Errorf("carrier closed by the peer: %w", io.ErrUnexpectedEOF)
	} else {
		err = fmt.Errorf("read carrier: %w", err)
	}
	w.fail(err)
	<-w.closed
	return 0, io.EOF
}

// inspect follows the frames in p and fails at the first improper one.
func (w *wire) inspect(p []byte) error {
	for len(p) > 0 {
		if w.body > 0 {
			n := min(int(w.body), len(p))
			w.body -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(w.header[w.have:], p)
		w.have += n
		p = p[n:]
		if w.have < headerLen {
			break
		}
		w.have = 0
		length := binary.BigEndian.Uint32(w.header[8:])
		switch {
		case w.header[0] != 0:
			return fmt.Errorf("%w: frame version %d", ErrProtocol, w.header[0])
		case w.header[1] == typeData && length <= window:
			w.body = length
		case w.header[1] == typeWindow && length <= window:
		default:
			// Pings are among these: neither end sends them, and yamux starts
			// a goroutine for each.
			return fmt.Errorf("%w: frame type %d, length %d", ErrProtocol, w.header[1], length)
		}
		if !w.spoken {
			w.spoken = true
			close(w.heard)
		}
	}
	return nil
}

// Write never fails: a carrier that is gone swallows. yamux writes a data
// frame's header and body apart; they leave together.
func (w *wire) Write(p []byte) (int, error) {
	if w.lost {
		return len(p), nil
	}
	if len(w.out) == 0 && p[1] == typeData && binary.BigEndian.Uint32(p[8:]) > 0 {
		w.out = append(w.out, p...)
		return len(p), nil
	}
	b := p
	if len(w.out) > 0 {
		w.out = append(w.out, p...)
		b, w.out = w.out, w.out[:0]
	}
	if _, err := w.conn.Write(b); err != nil {
		w.lost = true
		// A peer that has gone may have left something to read: Read ends the
		// Mux after that.
		if errors.Is(err, os.ErrDeadlineExceeded) {
			w.fail(fmt.Errorf("write carrier: peer does not read: %w", err))
		}
	}
	return len(p), nil
}

// Close closes the carrier and lets yamux go.
func (w *wire) Close() error {
	w.closeOnce.Do(func() {
		close(w.closed)
		w.closeErr = w.conn.Close()
	})
	return w.closeErr
}
