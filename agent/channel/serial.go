package channel

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/portmux"
)

// backlog is how many connections wait at a listener; it is no less than what
// one Mux carries, so that only one whose Accept nobody calls is ever full.
const backlog = 4096

var errClosed = fmt.Errorf("guest channel closed: %w", net.ErrClosed)

// A serial runs portmux over one byte stream after the other.
type serial struct {
	open   func(ctx context.Context) (io.ReadWriteCloser, error)
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when run has ended

	mu        sync.Mutex
	mux       *portmux.Mux  // nil while there is no host
	changed   chan struct{} // closed when mux or err changes, and replaced
	err       error         // why there will be no other mux
	listeners map[uint32]*listener
}

// NewSerial returns a channel over byte streams: each that open returns carries
// it until the host end goes away, then open is called for the next. An error
// from open ends the channel.
func NewSerial(open func(ctx context.Context) (io.ReadWriteCloser, error)) *Channel {
	ctx, cancel := context.WithCancelCause(context.Background())
	s := &serial{
		open:      open,
		cancel:    cancel,
		done:      make(chan struct{}),
		changed:   make(chan struct{}),
		listeners: make(map[uint32]*listener),
	}
	go s.run(ctx)
	return &Channel{carrier: s}
}

// run keeps a Mux while there is a host. It ends when ctx does or open fails.
func (s *serial) run(ctx context.Context) {
	defer close(s.done)
	for {
		stream, err := s.open(ctx)
		if err != nil {
			s.publish(nil, err)
			return
		}
		mux, err := portmux.New(stream, false)
		if err != nil {
			s.publish(nil, err)
			return
		}
		s.publish(mux, nil)
		for {
			port, conn, err := mux.Accept(ctx)
			if err != nil {
				break
			}
			s.dispatch(port, conn)
		}
		s.publish(nil, context.Cause(ctx))
		mux.Close() //nolint:errcheck // always nil
		if ctx.Err() != nil {
			return
		}
	}
}

// publish tells DialControl what there is to dial over.
func (s *serial) publish(mux *portmux.Mux, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mux, s.err = mux, err
	close(s.changed)
	s.changed = make(chan struct{})
}

// dispatch hands conn to the listener on its port, or closes it.
func (s *serial) dispatch(port uint32, conn net.Conn) {
	s.mu.Lock()
	l := s.listeners[port]
	s.mu.Unlock()
	if l == nil || !l.put(conn) {
		conn.Close() //nolint:errcheck // refused
	}
}

func (s *serial) dialControl(ctx context.Context) (net.Conn, error) {
	for {
		s.mu.Lock()
		mux, changed, err := s.mux, s.changed, s.err
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if mux != nil {
			conn, err := mux.Dial(ctx, portmux.ControlPort)
			if err == nil || mux.Err() == nil {
				return conn, err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (s *serial) listen(port uint32) (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	if s.listeners[port] != nil {
		return nil, unix.EADDRINUSE
	}
	l := &listener{serial: s, port: port, conns: make(chan net.Conn, backlog), closed: make(chan struct{})}
	s.listeners[port] = l
	return l, nil
}

func (s *serial) close() error {
	s.cancel(errClosed)
	<-s.done
	s.mu.Lock()
	listeners := make([]*listener, 0, len(s.listeners))
	for _, l := range s.listeners {
		listeners = append(listeners, l)
	}
	s.mu.Unlock()
	for _, l := range listeners {
		l.Close() //nolint:errcheck // always nil
	}
	return nil
}

// A listener queues the host's connections to one port.
type listener struct {
	serial *serial
	port   uint32
	conns  chan net.Conn

	mu     sync.Mutex    // orders put and Close
	closed chan struct{} // closed by Close
}

// put queues conn unless the listener is closed or full.
func (l *listener) put(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
		return false
	default:
	}
	select {
	case l.conns <- conn:
		return true
	default:
		return false
	}
}

// Accept waits for the next connection of the host.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, fmt.Errorf("accept on guest port %d: %w", l.port, net.ErrClosed)
	}
}

// Close refuses what is queued and what comes later. It is idempotent.
func (l *listener) Close() error {
	l.serial.mu.Lock()
	if l.serial.listeners[l.port] == l {
		delete(l.serial.listeners, l.port)
	}
	l.serial.mu.Unlock()

	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
		return nil
	default:
	}
	close(l.closed)
	for {
		select {
		case conn := <-l.conns:
			conn.Close() //nolint:errcheck // refused
		default:
			return nil
		}
	}
}

// Addr names the port.
func (l *listener) Addr() net.Addr { return portAddr(l.port) }

type portAddr uint32

func (portAddr) Network() string  { return "virtio-serial" }
func (p portAddr) String() string { return fmt.Sprint(uint32(p)) }
