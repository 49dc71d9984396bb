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
	table    *Table
	id       string
	path     string // on the host, resolved
	over     string
	reported chan report
	slots    chan struct{} // one for each open connection
	dials    chan struct{} // one for each that is being made
	end      chan struct{} // closed when it is taken away

	// Of the table's mu.
	owners map[string]*container
	causes map[string]time.Time // when they were logged
}

// A report is the guest's word of a connection.
type report struct {
	number    uint64
	container string // empty: not known
}

func (s *socket) guestPath() string { return agentv1.SocketsDir + "/" + s.id }

// serve takes reported connections, as long as there are slots, until the socket is
// taken away.
func (s *socket) serve() {
	for {
		var r report
		select {
		case r = <-s.reported:
		case <-s.end:
			return
		}
		for _, slots := range []chan struct{}{s.slots, s.table.slots} {
			select {
			case slots <- struct{}{}:
			case <-s.end:
				return // with it goes what waits in the guest
			}
		}
		c := s.owner(r.container)
		if c == nil {
			s.complain(r.container, errors.New("the process that has connected is of no container that has the socket, or has ended"))
			s.table.work.Go(func() {
				defer s.release()
				s.refuse(r.number)
			})
			continue
		}
		go func() { // it is counted already
			defer c.work.Done()
			defer s.release()
			s.carry(c, r.number)
		}()
	}
}

func (s *socket) release() { <-s.table.slots; <-s.slots }

// owner is in whose name a connection is made, with its work counted; nil: nobody's.
// Where the guest does not know, the only one who has the socket is meant; a
// container that does not have it has come by another's files, and gets nothing.
func (s *socket) owner(reported string) *container {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	c := s.owners[reported]
	if reported == "" && len(s.owners) == 1 {
		for _, only := range s.owners {
			c = only
		}
	}
	if c != nil {
		c.work.Add(1)
	}
	return c
}

// refuse closes a connection that is nobody's.
func (s *socket) refuse(number uint64) {
	if carrier, err := s.claim(s.table.ctx, forward.Target{Network: forward.Accepted, Connection: number, Refusal: syscall.EACCES}); err == nil {
		carrier.Close()
	}
}

// carry carries one connection until it ends or its container does.
func (s *socket) carry(c *container, number uint64) {
	ctx := c.ctx
	target := forward.Target{Network: forward.Accepted, Connection: number}
	conn, err := s.dial(ctx, c)
	if err != nil {
		if ctx.Err() == nil {
			s.complain(c.id, err)
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
func (s *socket) dial(ctx context.Context, c *container) (net.Conn, error) {
	select {
	case s.dials <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-s.dials }()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return c.connect(ctx, s.path)
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
func (s *socket) complain(container string, err error) {
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
	s.table.opts.Log.Warn("a container's connection to a socket of the host is reset", "container", container, "socket", s.path, "err", err)
}
