// Package forward is the host's end of network flows that are carried over the
// guest channel: from a pod's network namespace to the guest (PortForward), and
// from the host to ports that a guest on the host's network listens on
// (HostPorts).
package forward

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/husk-containers/husk/protocols/forward"
)

const (
	// maxFlows bounds the TCP flows of a proxy at one time, as the guest does;
	// further ones wait.
	maxFlows = 1024
	// connectTimeout bounds what the guest takes to connect a flow. Its own
	// time-out is shorter.
	connectTimeout = 30 * time.Second
	// acceptPause is the wait after an accept that has failed, for want of
	// descriptors as a rule: nothing tells when there are some again.
	acceptPause = 100 * time.Millisecond
)

// A Dial connects to a port of the guest's channel.
type Dial func(ctx context.Context, port uint32) (net.Conn, error)

// open opens a flow to t in the guest.
func (dial Dial) open(ctx context.Context, t forward.Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	carrier, err := dial(ctx, forward.Port)
	if err != nil {
		return nil, err
	}
	if err := forward.Request(ctx, carrier, t); err != nil {
		carrier.Close()
		return nil, err
	}
	return carrier, nil
}

// A proxy carries what TCP listeners accept to the guest.
type proxy struct {
	dial  Dial
	log   *slog.Logger
	slots chan struct{}
	flows sync.WaitGroup
}

func newProxy(dial Dial, log *slog.Logger) *proxy {
	return &proxy{dial: dial, log: log, slots: make(chan struct{}, maxFlows)}
}

// serve accepts from ln until that is closed, and carries each connection to
// where target says until it ends or ctx does. The caller waits for p.flows
// afterwards.
func (p *proxy) serve(ctx context.Context, ln net.Listener, target func(*net.TCPConn) (forward.Target, error)) {
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.log.Warn("forward: accept", "address", ln.Addr().String(), "err", err)
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			forward.Reset(conn)
			conn.Close()
			continue // until ln is closed
		}
		p.flows.Go(func() {
			defer func() { <-p.slots }()
			p.carry(ctx, conn.(*net.TCPConn), target)
		})
	}
}

// carry carries one connection, and closes it.
func (p *proxy) carry(ctx context.Context, conn *net.TCPConn, target func(*net.TCPConn) (forward.Target, error)) {
	t, err := target(conn)
	if err == nil {
		var carrier net.Conn
		if carrier, err = p.dial.open(ctx, t); err == nil {
			forward.Copy(ctx, carrier, conn)
			return
		}
	}
	p.log.Debug("forward: connection reset", "err", err)
	forward.Reset(conn)
	conn.Close()
}
