// Package forward is the guest's end of network flows that the host carries over
// the channel: it connects to where each goes, and copies.
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
	// maxFlows bounds the flows at one time; further ones are refused with ENFILE.
	maxFlows = 1024
	// connectTimeout bounds a connect in the guest.
	connectTimeout = 20 * time.Second
)

// Serve carries the flows that come from ln until ctx ends or the listener fails.
// It closes the listener and resets the flows then, and returns when they are
// closed; nil if ctx was the reason.
func Serve(ctx context.Context, ln net.Listener) error { return serve(ctx, ln, maxFlows) }

func serve(ctx context.Context, ln net.Listener, limit int) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var flows sync.WaitGroup
	defer flows.Wait()
	carrying, cancel := context.WithCancel(ctx)
	defer cancel() // the flows, before they are waited for
	slots := make(chan struct{}, limit)
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept forward connection: %w", err)
		}
		select {
		case slots <- struct{}{}:
			flows.Go(func() {
				defer func() { <-slots }()
				carry(carrying, conn)
			})
		default:
			slog.Warn("too many forwarded flows", "max", limit)
			refuse(carrying, conn, syscall.ENFILE)
		}
	}
}

// refuse answers what a connection asks for with an error. Others wait
// meanwhile: a host that has so many asks at once.
func refuse(ctx context.Context, conn net.Conn, errno syscall.Errno) {
	defer closing(ctx, conn)()
	if _, err := forward.ReadRequest(conn); err == nil { // else the answer would get lost
		forward.Answer(conn, errno) //nolint:errcheck // it is refused either way
	}
}

// carry serves one connection, and closes it.
func carry(ctx context.Context, carrier net.Conn) {
	defer closing(ctx, carrier)()
	target, err := forward.ReadRequest(carrier)
	if err != nil {
		if ctx.Err() == nil {
			slog.Warn("forward connection refused", "err", err)
		}
		return
	}
	conn, err := connect(ctx, target)
	if err != nil {
		slog.Debug("forward", "err", err)
		forward.Answer(carrier, err) //nolint:errcheck // the host is gone
		return
	}
	if err := forward.Answer(carrier, nil); err != nil {
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
