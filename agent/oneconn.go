package agent

import (
	"context"
	"io"
	"net"
	"sync"
)

// A oneConn is a listener that accepts one connection. Its ctx ends when that
// connection is closed, by either side, or when the listener is.
type oneConn struct {
	conn   chan net.Conn
	addr   net.Addr
	ctx    context.Context //nolint:containedctx // it is the listener's own end, not a call's
	cancel context.CancelFunc
}

func newOneConn(conn net.Conn) *oneConn {
	l := &oneConn{conn: make(chan net.Conn, 1), addr: conn.LocalAddr()}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.conn <- &controlConn{Conn: conn, closed: l.cancel}
	return l
}

// Accept returns the connection, and then blocks until there can be no other.
func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conn:
		return conn, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error {
	l.cancel()
	return nil
}

func (l *oneConn) Addr() net.Addr { return l.addr }

// A controlConn reads EOF however it ends: ttrpc takes that for the end of its
// peer, and any other error for one more to wait behind.
type controlConn struct {
	net.Conn
	once   sync.Once
	closed func()
}

func (c *controlConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

func (c *controlConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.closed)
	return err
}
