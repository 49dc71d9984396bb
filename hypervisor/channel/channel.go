// Package channel is the host's end of the connections between host and guest.
//
// Two carriers with one meaning: vhost-vsock, which the host's kernel provides,
// and one virtio-serial port that carries numbered ports. The guest speaks
// first, on its control connection; only then can the host dial.
package channel

import (
	"context"
	"net"
)

// A Carrier connects the host to one guest. Methods are safe for concurrent use.
type Carrier interface {
	// Kind is "vhost-vsock" or "virtio-serial".
	Kind() string
	// GuestParam is the kernel parameter that tells the guest's agent of it,
	// husk.channel=...
	GuestParam() string
	// Dial connects to a port in the guest; it waits until the guest has made
	// its first connection. The connection has a method CloseWrite() error.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Accept waits for the next control connection of the guest.
	Accept(ctx context.Context) (net.Conn, error)
	// Close ends Accept and Dial and releases the carrier. It is idempotent.
	Close() error
}

var (
	_ Carrier = (*Vsock)(nil)
	_ Carrier = (*Serial)(nil)
)

// maxBacklog control connections wait for Accept; further ones are closed. A
// guest needs one.
const maxBacklog = 8

// An inbox holds the guest's control connections until Accept takes them.
type inbox struct {
	conns chan net.Conn
	// first is closed when the guest has made its first connection.
	first chan struct{}
}

func newInbox() inbox {
	return inbox{conns: make(chan net.Conn, maxBacklog), first: make(chan struct{})}
}

// put files conn, or closes it where there are too many. It has one caller.
func (b *inbox) put(conn net.Conn) {
	select {
	case b.conns <- conn:
	default:
		conn.Close() //nolint:errcheck // refused
	}
	select {
	case <-b.first:
	default:
		close(b.first)
	}
}

// drain closes what nobody has accepted.
func (b *inbox) drain() {
	for {
		select {
		case conn := <-b.conns:
			conn.Close() //nolint:errcheck // abandoned
		default:
			return
		}
	}
}
