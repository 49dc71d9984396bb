package portmux

import (
	"bufio"
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
	in    *bufio.Reader
	frame []byte // what yamux has not read yet of a frame; part of in's buffer

	mu      sync.Mutex
	changed sync.Cond // out or lost has changed
	out     []byte    // written, and not yet taken by the flusher
	lost    bool      // nothing more can be written
}

func newWire(conn io.ReadWriteCloser, fail func(error)) *wire {
	w := &wire{
		conn:   conn,
		fail:   fail,
		closed: make(chan struct{}),
		in:     bufio.NewReaderSize(conn, 2*(headerLen+maxFrame)),
	}
	w.changed.L = &w.mu
	w.wg.Go(w.flush)
	return w
}

// Read yields frames that are proper and complete: yamux holds a connection's
// lock while it reads a body. It returns io.EOF only after Close.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.frame) == 0 {
		var err error
		if w.frame, err = w.next(); err != nil {
			w.fail(err)
			<-w.closed
			return 0, io.EOF
		}
	}
	n := copy(p, w.frame)
	w.frame = w.frame[n:]
	return n, nil
}

// next returns the next frame, which is valid until the one after it is asked
// for.
func (w *wire) next() ([]byte, error) {
	header, err := w.in.Peek(headerLen)
	if err != nil {
		return nil, carrierError(err)
	}
	size, err := frameSize(header)
	if err != nil {
		return nil, err
	}
	frame, err := w.in.Peek(size)
	if err != nil {
		return nil, carrierError(err)
	}
	w.in.Discard(size) //nolint:errcheck // it has just been seen
	return frame, nil
}

// frameSize returns the length of a frame with its header, if the other end of
// this package may have sent it. Pings are not among those: yamux starts a
// goroutine for each.
func frameSize(header []byte) (int, error) {
	version, kind, length := header[0], header[1], binary.BigEndian.Uint32(header[8:])
	switch {
	case version == 0 && kind == typeData && length <= maxFrame:
		return headerLen + int(length), nil
	case version == 0 && kind == typeWindow && length <= window:
		return headerLen, nil
	}
	return 0, fmt.Errorf("%w: frame of version %d, type %d, length %d", ErrProtocol, version, kind, length)
}

func carrierError(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("carrier closed by the peer: %w", io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read carrier: %w", err)
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
