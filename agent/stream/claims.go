// Package stream carries the standard streams of processes in the guest: it
// keeps the connections that the host opens for them until they are claimed,
// and copies between them and the process's pipes or terminal.
package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/protocols/stream"
)

const (
	// maxUnclaimed bounds the connections that no process has claimed yet.
	maxUnclaimed = 256
	// claimTimeout is how long a connection may wait for its process.
	claimTimeout = 30 * time.Second
)

// Claims keeps host-opened stream connections by token until each is claimed,
// once. Its methods are safe for concurrent use.
type Claims struct {
	ln      net.Listener
	timeout time.Duration

	mu      sync.Mutex
	waiting map[stream.Token]*claim
	open    map[net.Conn]struct{} // waiting or in the handshake
	closed  bool
}

type claim struct {
	conn  net.Conn
	timer *time.Timer
}

// NewClaims returns claims on the connections that ln accepts. Serve must run
// for there to be any.
func NewClaims(ln net.Listener) *Claims {
	return &Claims{
		ln:      ln,
		timeout: claimTimeout,
		waiting: make(map[stream.Token]*claim),
		open:    make(map[net.Conn]struct{}),
	}
}

// Serve accepts connections until ctx ends or the listener fails. It closes the
// listener and what is unclaimed then, and returns nil if ctx was the reason.
func (c *Claims) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.ln.Close() })
	defer stop()
	var handshakes sync.WaitGroup
	defer handshakes.Wait() // they end: their connections are closed
	defer c.close()
	for {
		conn, err := c.ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept stream connection: %w", err)
		}
		if !c.admit(conn) {
			conn.Close()
			slog.Warn("too many unclaimed stream connections", "max", maxUnclaimed)
			continue
		}
		handshakes.Go(func() {
			if err := c.file(conn); err != nil {
				c.drop(conn)
				slog.Warn("stream connection refused", "err", err)
			}
		})
	}
}

// admit counts conn in, unless there are too many.
func (c *Claims) admit(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.open) >= maxUnclaimed {
		return false
	}
	c.open[conn] = struct{}{}
	return true
}

// drop closes conn, which is not under a token.
func (c *Claims) drop(conn net.Conn) {
	c.mu.Lock()
	delete(c.open, conn)
	c.mu.Unlock()
	conn.Close()
}

// file reads the handshake and puts conn under its token. The answer goes out
// last, so that the host may have the token claimed at once.
func (c *Claims) file(conn net.Conn) error {
	token, err := stream.ReadToken(conn)
	if err != nil {
		return err
	}
	c.mu.Lock()
	taken := c.closed || c.waiting[token] != nil
	if !taken {
		c.waiting[token] = &claim{conn: conn, timer: time.AfterFunc(c.timeout, func() { c.expire(token, conn) })}
	}
	c.mu.Unlock()
	if taken {
		stream.Answer(conn, false) //nolint:errcheck // it is refused either way
		return fmt.Errorf("keep stream %s: %w", token, errdefs.ErrAlreadyExists)
	}
	if err := stream.Answer(conn, true); err != nil {
		c.expire(token, conn)
		return fmt.Errorf("keep stream %s: %w", token, err)
	}
	return nil
}

// expire drops conn if it still waits under token.
func (c *Claims) expire(token stream.Token, conn net.Conn) {
	c.mu.Lock()
	w := c.waiting[token]
	found := w != nil && w.conn == conn
	if found {
		delete(c.waiting, token)
		delete(c.open, conn)
	}
	c.mu.Unlock()
	if found {
		w.timer.Stop()
		conn.Close()
	}
}

// Claim hands over the connection kept under a token, given as in the protocol:
// an empty one gives nil. The caller closes the connection. It fails with
// InvalidArgument for a bad token and with NotFound where none waits.
func (c *Claims) Claim(token []byte) (net.Conn, error) {
	if len(token) == 0 {
		return nil, nil
	}
	t, err := stream.ParseToken(token)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.waiting[t]
	if w == nil {
		return nil, fmt.Errorf("claim stream %s: no connection waits under it: %w", t, errdefs.ErrNotFound)
	}
	w.timer.Stop()
	delete(c.waiting, t)
	delete(c.open, w.conn)
	return w.conn, nil
}

// ClaimAll claims the connections of three tokens, all or none: on error those
// that were there are closed.
func (c *Claims) ClaimAll(stdin, stdout, stderr []byte) (Conns, error) {
	var conns Conns
	var errs [3]error
	conns.Stdin, errs[0] = c.Claim(stdin)
	conns.Stdout, errs[1] = c.Claim(stdout)
	conns.Stderr, errs[2] = c.Claim(stderr)
	if err := errors.Join(errs[:]...); err != nil {
		conns.Close()
		return Conns{}, err
	}
	return conns, nil
}

func (c *Claims) close() {
	c.mu.Lock()
	c.closed = true
	waiting, open := c.waiting, c.open
	c.waiting, c.open = nil, nil
	c.mu.Unlock()
	for _, w := range waiting {
		w.timer.Stop()
	}
	for conn := range open {
		conn.Close()
	}
}
