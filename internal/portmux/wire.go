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

// outLimit is how many bytes wait for the carrier at most, but for one frame.
const outLimit = 128 << 10

// A wire stands between yamux and the carrier. It lets in only what the other
// end of this package sends. It gathers what is written while the carrier is
// busy: yamux writes each header and body apart, and a write costs a device much
// more than the bytes in it. And when the carrier ends it parks yamux instead of
// telling it, for yamux would mark every stream as ended, and a connection cut
// short would read like one that was complete.
type wire struct {
	conn io.ReadWriteCloser
	fail func(error) // told once or more often why the carrier is of no use

	closed    chan struct{}
	closeOnce sync.Once
	wg        sync.WaitGroup // the flusher

	// Of the one goroutine that reads.
	header [headerLen]byte
	have   int    // bytes of header
	body   uint32 // bytes of the frame's body to come
	heard  chan struct{}
	spoken bool // heard is closed

	mu      sync.Mutex
	changed sync.Cond // out or lost has changed
	out     []byte    // written, and not yet taken by the flusher
	lost    bool      // nothing more can be written
}

func newWire(conn io.ReadWriteCloser, fail func(error)) *wire {
	w := &wire{conn: conn, fail: fail, closed: make(chan struct{}), heard: make(chan struct{})}
	w.changed.L = &w.mu
	w.wg.Go(w.flush)
	return w
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

// Write keeps p for the flusher. It never fails: a carrier that is gone swallows.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.out) >= outLimit && !w.lost {
		w.changed.Wait()
	}
	if !w.lost {
		w.out = append(w.out, p...)
		w.changed.Broadcast()
	}
	return len(p), nil
}

// flush writes what is there to write, all of it at a time, until the carrier is
// lost or closed.
func (w *wire) flush() {
	var batch []byte
	for {
		w.mu.Lock()
		for len(w.out) == 0 && !w.lost {
			w.changed.Wait()
		}
		if w.lost {
			w.mu.Unlock()
			return
		}
		batch, w.out = w.out, batch[:0]
		w.changed.Broadcast()
		w.mu.Unlock()

		if _, err := w.conn.Write(batch); err != nil {
			w.lose()
			// A peer that has gone may have left something to read: Read ends
			// the Mux after that.
			if errors.Is(err, os.ErrDeadlineExceeded) {
				w.fail(fmt.Errorf("write carrier: peer does not read: %w", err))
			}
		}
	}
}

// lose gives up writing.
func (w *wire) lose() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lost = true
	w.changed.Broadcast()
}

// Close closes the carrier and lets yamux go. What the flusher has not written
// is lost.
func (w *wire) Close() error {
	w.closeOnce.Do(func() {
		close(w.closed)
		w.lose()
		w.conn.Close() //nolint:errcheck // it ends whatever that says
	})
	w.wg.Wait()
	return nil
}
