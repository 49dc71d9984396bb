package sockets

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
)

const (
	// maxDials bounds the connections of one socket that are being made: a server
	// that does not accept holds each for a while.
	maxDials = 8
	// dialTimeout bounds one connect on the host, and one claim in the guest.
	dialTimeout = 20 * time.Second
	// complainAgain is how long a cause that was logged is not logged again, and
	// maxCauses how many are remembered.
	complainAgain = time.Minute
	maxCauses     = 16
)

// A socket is one of the host that stands in the guest.
type socket struct {
	table     *Table
	container *container
	id        string
	path      string // on the host, resolved
	over      string
	reported  chan uint64
	slots     chan struct{} // one for each open connection
	dials     chan struct{} // one for each that is being made
	end       chan struct{} // closed when it is taken away

	// Of the table's mu: when causes of failure were logged.
	causes map[string]time.Time
}

func (s *socket) guestPath() string { return agentv1.SocketsDir + "/" + s.id }

// serve takes reported connections, as long as there are slots, until the socket or
// its container is taken away.
func (s *socket) serve() {
	for {
		var number uint64
		select {
		case number = <-s.reported:
		case <-s.end:
			return
		case <-s.container.ctx.Done():
			return
		}
		for _, slots := range []chan struct{}{s.slots, s.table.slots} {
			select {
			case slots <- struct{}{}:
			case <-s.end:
				return // with it goes what waits in the guest
			case <-s.container.ctx.Done():
				return
			}
		}
		s.container.work.Go(func() {
			defer func() { <-s.table.slots; <-s.slots }()
			s.carry(s.container.ctx, number)
		})
	}
}

// carry carries one connection until it ends or ctx does.
func (s *socket) carry(ctx context.Context, number uint64) {
	target := forward.Target{Network: forward.Accepted, Connection: number}
	conn, err := s.dial(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.complain(err)
		}
		target.Refusal = syscall.ECONNREFUSED
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			target.Refusal = errno
		}
	}
	carrier, cerr := s.claim(ctx, target)
	switch {
	case cerr != nil:
		s.table.opts.Log.Debug("connection to a socket of the host", "socket", s.path, "err", cerr)
		if conn != nil {
			conn.Close()
		}
	case conn == nil:
		carrier.Close() // the guest has closed its end
	default:
		forward.Copy(ctx, carrier, conn)
	}
}

// dial connects to the host's socket, which may be another than the last time.
func (s *socket) dial(ctx context.Context) (net.Conn, error) {
	select {
	case s.dials <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.dials }()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return s.container.connect(ctx, s.path)
}

// claim takes the guest's connection.
func (s *socket) claim(ctx context.Context, target forward.Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	carrier, err := s.table.opts.Guest.Dial(ctx, forward.Port)
	if err != nil {
		return nil, err
	}
	if err := forward.Request(ctx, carrier, target); err != nil {
		carrier.Close()
		return nil, err
	}
	return carrier, nil
}

// complain logs why a connection fails, each cause now and then.
func (s *socket) complain(err error) {
	cause, now := err.Error(), time.Now()
	s.table.mu.Lock()
	last, known := s.causes[cause]
	quiet := known && now.Sub(last) < complainAgain || !known && len(s.causes) >= maxCauses
	if !quiet {
		if s.causes == nil {
			s.causes = map[string]time.Time{}
		}
		s.causes[cause] = now
	}
	s.table.mu.Unlock()
	if quiet {
		return
	}
	s.table.opts.Log.Warn("a container's connection to a socket of the host is reset", "container", s.container.id, "socket", s.path, "err", err)
}
