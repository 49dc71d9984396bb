package portmux

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// A Conn is one connection of a Mux. As a net.Conn is, it is safe for concurrent
// use; Read calls take turns.
//
//	open --CloseWrite--> half-closed --Close--> lingering --peer's FIN--> gone
//	  \------------------Close------------------^
type Conn struct {
	mux    *Mux
	stream *yamux.Stream
	port   uint32 // set before Accept returns it

	reading sync.Mutex // held during Read
	mu      sync.Mutex // guards closed and its order with deadlines; taken inside mux.mu
	closed  bool
	dead    bool // the Mux is
}

// past is a deadline that has been missed.
var past = time.Unix(1, 0)

// Read reads what the peer sends; io.EOF means that the peer has closed. When
// the Mux ends first, what had arrived is read and then its error returned.
func (c *Conn) Read(b []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	n, err := c.stream.Read(b)
	return n, c.explain(err)
}

// Write queues b for the carrier. A deadline interrupts it where it waits for
// the peer's reader, but not where the carrier itself is stalled.
func (c *Conn) Write(b []byte) (int, error) {
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	if err := c.mux.Err(); err != nil {
		return 0, err
	}
	var total int
	for len(b) > 0 {
		n, err := c.stream.Write(b[:min(len(b), maxFrame)])
		total += n
		b = b[n:]
		if err == nil {
			err = c.mux.Err() // yamux does not know when the carrier has gone
		}
		if err != nil {
			return total, c.explain(err)
		}
	}
	return total, nil
}

// explain turns yamux's errors into those of package net. yamux says EOF at the
// end of the session too; only a FIN of the peer is one.
func (c *Conn) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case c.isClosed():
		return net.ErrClosed
	case errors.Is(err, io.EOF) && !c.mux.session.IsClosed():
		return io.EOF
	case c.mux.session.IsClosed():
		<-c.mux.dead // at once: the accept loop sees it too
	}
	if dead := c.mux.Err(); dead != nil {
		return dead
	}
	switch {
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	case errors.Is(err, yamux.ErrStreamClosed):
		return io.ErrClosedPipe // written to after CloseWrite
	}
	return err
}

// CloseWrite tells the peer that nothing more will be written: it reads io.EOF.
func (c *Conn) CloseWrite() error {
	if c.isClosed() {
		return net.ErrClosed
	}
	if err := c.mux.Err(); err != nil {
		return err
	}
	return c.stream.Close()
}

// Close ends both directions at once and does not wait for the peer. It is
// idempotent and returns nil.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.stream.SetDeadline(past) //nolint:errcheck // always nil
	c.mu.Unlock()
	if c.mux.spawn(c.linger) != nil {
		c.mux.forget(c) // dead: there is no peer to wait for
	}
	return nil
}

// linger sends the FIN and drops what the peer sends until its own.
func (c *Conn) linger() {
	defer c.mux.forget(c)
	c.stream.Close() //nolint:errcheck // always nil
	c.reading.Lock() // Close has interrupted the reader, if any; no other one starts
	c.mu.Lock()
	if !c.dead {
		c.stream.SetReadDeadline(time.Time{}) //nolint:errcheck // always nil
	}
	c.mu.Unlock()
	c.reading.Unlock()
	var sink [4096]byte
	for {
		if _, err := c.stream.Read(sink[:]); err != nil {
			return
		}
		c.stream.Shrink()
	}
}

// interrupt makes pending and later calls fail because the Mux has ended.
func (c *Conn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	c.stream.SetDeadline(past) //nolint:errcheck // always nil
}

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline(c.stream.SetDeadline, t) }

// SetReadDeadline bounds pending and later Reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(c.stream.SetReadDeadline, t) }

// SetWriteDeadline bounds pending and later Writes while they wait for the
// peer's reader.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(c.stream.SetWriteDeadline, t)
}

func (c *Conn) setDeadline(set func(time.Time) error, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	if c.dead {
		return nil // the deadline that interrupts stays
	}
	return set(t)
}

// LocalAddr returns a placeholder: a carrier has no addresses.
func (c *Conn) LocalAddr() net.Addr { return addr{} }

// RemoteAddr returns a placeholder: a carrier has no addresses.
func (c *Conn) RemoteAddr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "portmux" }
func (addr) String() string  { return "portmux" }
