package forward

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/forward"
)

const (
	// udpIdle is how long a UDP flow is kept in which nothing moves: as the
	// kernel's connection tracking keeps one that has gone both ways.
	udpIdle = 2 * time.Minute
	// maxPacketFlows bounds the UDP flows of all listeners together; datagrams of
	// further clients are lost.
	maxPacketFlows = 512
	// maxQueued bounds the datagrams of a flow that wait for the guest; further
	// ones are lost.
	maxQueued = 64
)

// packetFlows carry what UDP listeners receive to the guest, and the answers
// back: a flow for each client and each address of the host it talks to.
type packetFlows struct {
	dial  Dial
	log   *slog.Logger
	slots chan struct{}
	idle  time.Duration
}

func newPacketFlows(dial Dial, log *slog.Logger) *packetFlows {
	return &packetFlows{dial: dial, log: log, slots: make(chan struct{}, maxPacketFlows), idle: udpIdle}
}

// A peer is whom a flow is with.
type peer struct {
	client netip.AddrPort
	local  netip.Addr // the host's address
}

// serve carries the datagrams of conn until that is closed or ctx ends, and
// returns when the flows of it have ended.
func (p *packetFlows) serve(ctx context.Context, conn *net.UDPConn, target func(local netip.Addr) forward.Target) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	var mu sync.Mutex // guards flows
	flows := make(map[peer]chan []byte)
	buf := make([]byte, forward.MaxFrame)
	control := make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo))
	for {
		n, size, _, client, err := conn.ReadMsgUDPAddrPort(buf, control)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // the error of a datagram sent: they are reported here
		}
		who := peer{client, localAddr(control[:size])}
		mu.Lock()
		queue := flows[who]
		if queue == nil {
			select {
			case p.slots <- struct{}{}:
			default:
				mu.Unlock()
				continue
			}
			queue = make(chan []byte, maxQueued)
			flows[who] = queue
			running.Go(func() {
				defer func() { <-p.slots }()
				p.carry(ctx, conn, who, target(who.local), queue)
				mu.Lock()
				delete(flows, who)
				mu.Unlock()
			})
		}
		select {
		case queue <- append([]byte(nil), buf[:n]...):
		default:
		}
		mu.Unlock()
	}
}

// carry carries one flow until nothing has moved for p.idle, either end ends it,
// or ctx does.
func (p *packetFlows) carry(ctx context.Context, conn *net.UDPConn, who peer, t forward.Target, queue <-chan []byte) {
	carrier, err := p.dial.open(ctx, t)
	if err != nil {
		p.log.Debug("forward: datagrams lost", "err", err)
		return
	}
	moved := make(chan struct{}, 1)
	var back sync.WaitGroup
	defer back.Wait()
	defer carrier.Close()
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { carrier.Close() }) // a write may wait
	defer stop()
	defer cancel()
	back.Go(func() {
		defer cancel()
		frames := forward.NewFrameReader(carrier)
		from := sendFrom(who.local)
		for {
			datagram, err := frames.Next()
			if err != nil {
				return
			}
			conn.WriteMsgUDPAddrPort(datagram, from, who.client) //nolint:errcheck // lost, as datagrams are
			select {
			case moved <- struct{}{}:
			default:
			}
		}
	})
	timer := time.NewTimer(p.idle)
	defer timer.Stop()
	var frame []byte
	for {
		select {
		case datagram := <-queue:
			if frame, err = forward.AppendFrame(frame[:0], datagram); err != nil {
				continue
			}
			if _, err := carrier.Write(frame); err != nil {
				return
			}
		case <-moved:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
		timer.Reset(p.idle)
	}
}

// localAddr returns the host's address that a datagram came to, by its control
// message; the zero Addr if that has none.
func localAddr(control []byte) netip.Addr {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(m.Data[4:8])) // ipi_spec_dst
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(m.Data[:16])) // ipi6_addr
		}
	}
	return netip.Addr{}
}

// sendFrom returns the control message that has a datagram sent from an address:
// a client that asked one address of the host takes no answer from another.
func sendFrom(local netip.Addr) []byte {
	switch {
	case local.Is4():
		addr := local.As4()
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: addr})
	case local.Is6() && !local.IsLinkLocalUnicast(): // of those the route must find the link
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: local.As16()})
	}
	return nil
}
