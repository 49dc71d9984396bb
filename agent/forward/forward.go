// Package forward is the guest's end of flows that the host carries over the
// channel: it connects to where each goes, or takes the connection that the guest
// has accepted, and copies.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/husk-containers/husk/protocols/forward"
)

const (
	// maxFlows bounds the network flows at one time, and maxAccepted those of
	// connections to unix sockets; further ones are refused with ENFILE.
	maxFlows    = 1024
	maxAccepted = 1024
	// connectTimeout bounds a connect in the guest.
	connectTimeout = 20 * time.Second
)

// A Claim takes the connection of a number that the guest has accepted at a unix
// socket; nil where there are none.
type Claim func(number uint64) (net.Conn, error)

// Serve carries the flows that come from ln until ctx ends or the listener fails.
// It closes the listener and resets the flows then, and returns when they are
// closed; nil if ctx was the reason.
func Serve(ctx context.Context, ln net.Listener, claim Claim) error {
	return newServer(claim, maxFlows, maxAccepted).serve(ctx, ln)
}

// A server carries flows.
type server struct {
	claim           Claim
	flows, accepted chan struct{} // slots
	all             chan struct{} // as many as both, and as many again that have not said yet what they are
}

func newServer(claim Claim, flows, accepted int) *server {
	return &server{
		claim: claim, flows: make(chan struct{}, flows), accepted: make(chan struct{}, accepted),
		all: make(chan struct{}, 2*(flows+accepted)),
	}
}

func (s *server) serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var flows sync.WaitGroup
	defer flows.Wait()
	carrying, cancel := context.WithCancel(ctx)
	defer cancel() // the flows, before they are waited for
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept forward connection: %w", err)
		}
		select {
		case s.all <- struct{}{}: // others wait: a host that has so many asks at once
			flows.Go(func() {
				defer func() { <-s.all }()
				s.carry(carrying, conn)
			})
		case <-ctx.Done():
			conn.Close()
		}
	}
}

// carry serves one connection, and closes it.
func (s *server) carry(ctx context.Context, carrier net.Conn) {
	defer closing(ctx, carrier)()
	target, err := forward.ReadRequest(carrier)
	if err != nil {
		if ctx.Err() == nil {
			slog.Warn("forward connection refused", "err", err)
		}
		return
	}
	slots := s.flows
	if target.Network == forward.Accepted {
		slots = s.accepted
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	default:
		slog.Warn("too many forwarded flows", "network", target.Network, "max", cap(slots))
		forward.Answer(carrier, syscall.ENFILE) //nolint:errcheck // it is refused either way
		return
	}
	conn, err := s.open(ctx, target)
	if err != nil {
		slog.Debug("forward", "err", err)
		forward.Answer(carrier, err) //nolint:errcheck // the host is gone
		return
	}
	if err := forward.Answer(carrier, nil); err != nil || target.Refusal != 0 {
		forward.Reset(conn)
		conn.Close()
		return
	}
	if target.Network == forward.UDP {
		copyDatagrams(ctx, carrier, conn)
		return
	}
	forward.Copy(ctx, carrier, conn)
}

// open connects to t, or takes what was accepted.
func (s *server) open(ctx context.Context, t forward.Target) (net.Conn, error) {
	if t.Network != forward.Accepted {
		return connect(ctx, t)
	}
	if s.claim == nil {
		return nil, syscall.ENOENT
	}
	return s.claim(t.Connection)
}

// closing closes conn when ctx ends; the function that it returns does so at
// once.
func closing(ctx context.Context, conn net.Conn) func() {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	return func() {
		stop()
		conn.Close()
	}
}

// loopback is where a target without an address may be, in the order to try.
var loopback = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// connect connects to t. The error is that of its address, or of the first of
// loopback's.
func connect(ctx context.Context, t forward.Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	dialer := net.Dialer{KeepAlive: -1} // what is idle is the host's business
	addrs := []netip.Addr{t.Addr}
	if !t.Addr.IsValid() {
		addrs = loopback
	}
	var first error
	for _, addr := range addrs {
		conn, err := dialer.DialContext(ctx, t.Network.String(), netip.AddrPortFrom(addr, t.Port).String())
		if err == nil {
			return conn, nil
		}
		if first == nil {
			first = err
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("forward to %s: %w", t, errors.Join(syscall.ETIMEDOUT, first))
	}
	return nil, fmt.Errorf("forward to %s: %w", t, first)
}

// copyDatagrams carries a UDP flow between carrier and conn, a connected socket,
// until the host closes it or ctx ends, and closes both. As on any network a
// datagram that cannot be sent is lost.
func copyDatagrams(ctx context.Context, carrier, conn net.Conn) {
	end := func() { carrier.Close(); conn.Close() }
	stop := context.AfterFunc(ctx, end)
	defer stop()
	var in sync.WaitGroup
	in.Go(func() {
		defer end()
		frames := forward.NewFrameReader(carrier)
		for {
			datagram, err := frames.Next()
			if err != nil {
				return
			}
			if _, err := conn.Write(datagram); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	})
	defer in.Wait()
	defer end()
	buf := make([]byte, forward.MaxFrame)
	var frame []byte
	for {
		n, err := conn.Read(buf)
		if errors.Is(err, syscall.ECONNREFUSED) {
			continue // of one datagram; the next may find a listener
		}
		if err != nil {
			return
		}
		if frame, err = forward.AppendFrame(frame[:0], buf[:n]); err != nil {
			return
		}
		if _, err := carrier.Write(frame); err != nil {
			return
		}
	}
}
