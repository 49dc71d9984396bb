// Package portmux carries numbered ports over one byte stream.
//
// Each connection is a yamux stream whose first four bytes are the port,
// big-endian; what follows is the application's, unframed. CloseWrite is an
// in-band EOF. Close ends both directions: what the peer still sends is read and
// dropped, so that its writers never block on a reader that has gone.
//
//	dialer                                  acceptor
//	 | SYN, window                            |
//	 | port[4] bytes...                       |
//	 |--------------------------------------->| Accept: port, conn
//	 |<======================================>|
//	 | FIN (CloseWrite or Close)              |
//	 |--------------------------------------->| Read: io.EOF
//
// The peer is not trusted: frames that neither end of this package sends end the
// Mux, and so does a peer that leaves too many closed connections unfinished.
package portmux

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// ControlPort is the host's port of the control connection, which the guest dials
// first. (vhost-vsock has one set of ports for the whole host, and names the port
// on the guest's kernel command line.)
const ControlPort uint32 = 1024

const (
	// window is how many bytes may be under way to a reader on one connection.
	window = 1 << 20
	// maxPending connections wait for Accept, and as many again in yamux;
	// further ones wait at the peer.
	maxPending = 64
	// maxConns bounds connections of one Mux, including those closed here that
	// the peer has not closed yet.
	maxConns = 4096
	// headerTimeout bounds how long a fresh connection may withhold its port.
	headerTimeout = 30 * time.Second

	portLen = 4
	// maxFrame is the longest body sent, so that connections take turns.
	maxFrame = 64 << 10
)

var (
	// ErrClosed is why everything on a Mux fails after Close.
	ErrClosed = fmt.Errorf("port multiplexer closed: %w", net.ErrClosed)
	// ErrProtocol is why a Mux ends whose peer does not speak its protocol.
	ErrProtocol = errors.New("port multiplexer protocol violated by the peer")
)

// A Mux is one end of a byte stream that carries ports. It lives until the
// stream ends or Close is called; its owner calls Close in either case. Methods
// are safe for concurrent use.
type Mux struct {
	session  *yamux.Session
	wire     *wire
	accepted chan *Conn
	pending  chan struct{} // a token per connection between yamux and Accept
	dialing  chan struct{} // a token per Dial that yamux has not answered
	dead     chan struct{}
	wg       sync.WaitGroup // accept loop, and goroutines that end with the session

	mu    sync.Mutex
	err   error // why it is dead; set before dead is closed
	conns map[*Conn]struct{}
}

// New returns a Mux over conn, which it owns from now on. One end must be the
// client and the other not; it makes no other difference. Closing conn must
// unblock its Read and Write. A Write that times out ends the Mux; after any
// other error of Write, the Read must end too, and what it still yields counts.
func New(conn io.ReadWriteCloser, client bool) (*Mux, error) {
	m := &Mux{
		accepted: make(chan *Conn, maxPending),
		pending:  make(chan struct{}, maxPending),
		dialing:  make(chan struct{}, maxPending),
		dead:     make(chan struct{}),
		conns:    make(map[*Conn]struct{}),
	}
	m.wire = newWire(conn, m.fail)
	start := yamux.Server
	if client {
		start = yamux.Client
	}
	session, err := start(m.wire, &yamux.Config{
		AcceptBacklog: maxPending,
		// Never: a guest may be paused. Who needs a bound puts it on conn.
		ConnectionWriteTimeout: math.MaxInt64,
		KeepAliveInterval:      math.MaxInt64, // unused, but must not be 0
		MaxStreamWindowSize:    window,
		LogOutput:              io.Discard, // every error it logs also ends the session
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start port multiplexer: %w", err), conn.Close())
	}
	m.session = session
	m.wg.Go(m.acceptLoop)
	return m, nil
}

// Done is closed when the Mux has ended: the peer or the byte stream has gone,
// or Close was called.
func (m *Mux) Done() <-chan struct{} { return m.dead }

// Err says why the Mux has ended; it is nil before Done.
func (m *Mux) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close ends the Mux, its connections and the byte stream, and waits for all
// its goroutines. What was written last may be lost: only an answer of the peer
// proves that it has arrived. Close is idempotent and returns nil.
func (m *Mux) Close() error {
	m.fail(ErrClosed)
	m.wire.Close()    //nolint:errcheck // always nil
	m.session.Close() //nolint:errcheck // always nil
	m.wg.Wait()
	return nil
}

// Dial opens a connection to a port of the peer. It does not wait for the peer
// to accept: a peer that has nothing on that port closes the connection.
func (m *Mux) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := m.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial port %d: %w", port, err)
	}
	return conn, nil
}

func (m *Mux) dial(ctx context.Context, port uint32) (*Conn, error) {
	select {
	case m.dialing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-m.dead:
		return nil, m.Err()
	}
	type result struct {
		conn *Conn
		err  error
	}
	// yamux cannot be interrupted while the carrier is stalled, so it is called
	// from a goroutine, which ends with the session at the latest.
	opened := make(chan result, 1)
	if err := m.spawn(func() {
		defer func() { <-m.dialing }()
		conn, err := m.open(port)
		opened <- result{conn, err}
	}); err != nil {
		<-m.dialing
		return nil, err
	}
	abandon := func() {
		m.spawn(func() { //nolint:errcheck // a dead Mux closes the connection anyway
			if r := <-opened; r.err == nil {
				r.conn.Close() //nolint:errcheck // always nil
			}
		})
	}
	select {
	case r := <-opened:
		return r.conn, r.err
	case <-ctx.Done():
		abandon()
		return nil, context.Cause(ctx)
	case <-m.dead:
		return nil, m.Err()
	}
}

// open starts a stream and names its port.
func (m *Mux) open(port uint32) (*Conn, error) {
	stream, err := m.session.OpenStream()
	if err != nil {
		return nil, m.cause(err)
	}
	conn, err := m.newConn(stream)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, port)); err != nil {
		conn.Close() //nolint:errcheck // always nil
		return nil, err
	}
	return conn, nil
}

// Accept waits for the next connection of the peer and returns the port it is
// for.
func (m *Mux) Accept(ctx context.Context) (uint32, net.Conn, error) {
	select {
	case conn := <-m.accepted:
		<-m.pending
		return conn.port, conn, nil
	case <-ctx.Done():
		return 0, nil, fmt.Errorf("accept connection: %w", context.Cause(ctx))
	case <-m.dead:
		return 0, nil, fmt.Errorf("accept connection: %w", m.Err())
	}
}

// acceptLoop takes streams from yamux and has the port of each read. It ends
// with the session.
func (m *Mux) acceptLoop() {
	for {
		select {
		case m.pending <- struct{}{}:
		case <-m.dead:
			return
		}
		stream, err := m.session.AcceptStream()
		if err != nil {
			m.fail(fmt.Errorf("%w: %w", ErrProtocol, err))
			return
		}
		conn, err := m.newConn(stream)
		if err != nil {
			m.fail(err)
			return
		}
		m.wg.Go(func() { m.greet(conn) })
	}
}

// greet reads the port of a fresh connection and offers it to Accept.
func (m *Mux) greet(conn *Conn) {
	var port [portLen]byte
	conn.SetReadDeadline(time.Now().Add(headerTimeout)) //nolint:errcheck // a closed conn fails in the read
	if _, err := io.ReadFull(conn, port[:]); err != nil {
		conn.Close() //nolint:errcheck // always nil
		<-m.pending
		return
	}
	conn.SetReadDeadline(time.Time{}) //nolint:errcheck // likewise
	conn.port = binary.BigEndian.Uint32(port[:])
	m.accepted <- conn // never blocks: there is room for every token of pending
}

// newConn registers a connection.
func (m *Mux) newConn(stream *yamux.Stream) (*Conn, error) {
	conn := &Conn{mux: m, stream: stream}
	m.mu.Lock()
	err := m.err
	if err == nil && len(m.conns) >= maxConns {
		err = fmt.Errorf("more than %d connections open or not closed by the peer", maxConns)
	}
	if err == nil {
		m.conns[conn] = struct{}{}
	}
	m.mu.Unlock()
	if err != nil {
		stream.Close() //nolint:errcheck // always nil
		return nil, err
	}
	return conn, nil
}

// forget takes a connection that both ends have closed off the books.
func (m *Mux) forget(conn *Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conns, conn)
}

// spawn runs f in a goroutine that Close waits for. f must end with the session.
func (m *Mux) spawn(f func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.wg.Go(f)
	return nil
}

// fail ends the Mux for the given reason, unless it has ended already. What the
// peer has sent up to now stays readable.
func (m *Mux) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	close(m.dead)
	for conn := range m.conns {
		conn.interrupt()
	}
}

// cause is why the Mux is dead, or err where it is not.
func (m *Mux) cause(err error) error {
	if dead := m.Err(); dead != nil {
		return dead
	}
	return err
}
