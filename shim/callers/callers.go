// Package callers counts the connections to a ttrpc server, so that the server can let
// its clients leave first.
package callers

import (
	"context"
	"net"
	"sync"

	"github.com/containerd/ttrpc"
)

// Callers are the connections that a server has: as its handshake they admit whom
// another one does, and are counted.
//
// ttrpc's client may hear of the end of its connection before it hears the answer
// that came before, and a shim that ends at once may not even have sent that. To
// containerd a ShutdownSandbox without an answer has failed. So the shim lets its
// clients leave first.
type Callers struct {
	// Admit is the other handshake.
	Admit ttrpc.Handshaker

	mu   sync.Mutex
	open int
	// none is closed when none is open any more; nil: nobody waits.
	none chan struct{}
}

// Handshake implements ttrpc.Handshaker.
func (c *Callers) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	conn, credentials, err := c.Admit.Handshake(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open++
	return &client{Conn: conn, leave: sync.OnceFunc(c.leave)}, credentials, nil
}

func (c *Callers) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	if c.open == 0 && c.none != nil {
		close(c.none)
		c.none = nil
	}
}

// Wait returns when no connection is open, or ctx ends.
func (c *Callers) Wait(ctx context.Context) {
	c.mu.Lock()
	if c.open > 0 && c.none == nil {
		c.none = make(chan struct{})
	}
	none := c.none
	c.mu.Unlock()
	if none == nil {
		return
	}
	select {
	case <-none:
	case <-ctx.Done():
	}
}

// A client is one connection.
type client struct {
	net.Conn
	leave func()
}

func (c *client) Close() error {
	c.leave()
	return c.Conn.Close()
}
