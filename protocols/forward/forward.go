// Package forward is the handshake with which one connection to the guest
// becomes one flow, that is dialled in the guest or was accepted there, and what
// follows it.
//
// The host opens a connection to Port for every flow and says where it goes; the
// guest connects there and answers with the errno of that. Then frames follow,
// either way.
//
//	host                                                       guest
//	 | "HSKF" network[1] addrLen[1] addr[addrLen] port[2]        |
//	 |---------------------------------------------------------->| connect
//	 |                                                  errno[1] |
//	 |<----------------------------------------------------------| 0: connected
//	 | (length[2] bytes[length])*                                |
//	 |<=========================================================>|
//
// network is 1 for TCP and 2 for UDP; addrLen is 0 for the guest's loopback, 4 or
// 16; numbers are big-endian.
//
// network 3 is a connection that the guest has accepted at a unix socket and told
// of: addrLen is 8, addr the connection's number, and port 0, or the errno for
// which the host does not take it, and the guest closes it. The guest answers 0, or
// ENOENT where nothing waits under that number.
//
// A frame is a datagram of UDP, which may be empty, or some bytes of a stream. An
// empty frame is the half-close of a stream: its sender sends no more frames.
// The connection is closed when both have said so; closed before, the flow was
// reset. That difference is what the frames are for: a multiplexed connection
// does not tell a peer that has closed from one that has half-closed, and a
// service in the guest would go on sending to a client that is long gone.
package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Port is the guest port that the connections of flows are made to.
const Port uint32 = 1026

// handshakeTimeout bounds ReadRequest: a peer that connects says at once where
// to.
const handshakeTimeout = 30 * time.Second

const (
	magic  = "HSKF"
	prefix = len(magic) + 2 // up to and with addrLen
)

// ErrHandshake is returned where the peer does not speak this protocol.
var ErrHandshake = errors.New("not a husk forward handshake")

// A Network is what a flow is made of.
type Network byte

// The networks.
const (
	TCP      Network = 1
	UDP      Network = 2
	Accepted Network = 3 // a connection to a unix socket, accepted in the guest
)

// String returns the name as package net has it.
func (n Network) String() string {
	switch n {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case Accepted:
		return "accepted"
	}
	return fmt.Sprintf("network %d", byte(n))
}

// A Target is where a flow goes in the guest.
type Target struct {
	Network Network
	// Addr is one address, IPv4 as such and without a zone. The zero Addr is the
	// guest's loopback: 127.0.0.1, and for TCP where that refuses ::1.
	Addr netip.Addr
	Port uint16
	// Connection is the number of one that the guest has accepted, and Refusal why
	// the host does not take it, at most 65535; 0: it does. Both are Accepted's, which
	// has neither Addr nor Port.
	Connection uint64
	Refusal    syscall.Errno
}

// String returns tcp 192.0.2.1:80, tcp loopback:80, or accepted connection 7.
func (t Target) String() string {
	if t.Network == Accepted {
		return fmt.Sprintf("%s connection %d", t.Network, t.Connection)
	}
	if !t.Addr.IsValid() {
		return fmt.Sprintf("%s loopback:%d", t.Network, t.Port)
	}
	return fmt.Sprintf("%s %s", t.Network, netip.AddrPortFrom(t.Addr, t.Port))
}

// Validate reports what nothing can be connected to.
func (t Target) Validate() error {
	switch {
	case t.Network == Accepted:
		if t.Connection == 0 || t.Refusal > 1<<16-1 || t.Addr.IsValid() || t.Port != 0 {
			return fmt.Errorf("forward to %s: want a number, an errno, and neither address nor port", t)
		}
		return nil
	case t.Network != TCP && t.Network != UDP:
		return fmt.Errorf("forward to %s: unknown network", t)
	case t.Connection != 0, t.Refusal != 0:
		return fmt.Errorf("forward to %s: the number of a connection", t)
	case t.Port == 0:
		return fmt.Errorf("forward to %s: port 0", t)
	case t.Addr.Is4In6(), t.Addr.Zone() != "":
		return fmt.Errorf("forward to %s: want a plain IPv4 or IPv6 address", t)
	case t.Addr.IsUnspecified(), t.Addr.IsMulticast(), t.Addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("forward to %s: not the address of one host", t)
	}
	return nil
}

// Request is the host's end: it asks on conn, a fresh connection to Port, for t
// and returns once the guest is connected to it. Where the guest could not
// connect the error wraps its syscall.Errno. It ends when ctx does. After an
// error conn is of no further use and the caller closes it.
func Request(ctx context.Context, conn net.Conn, t Target) error {
	if err := t.Validate(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // closed or done
	defer stop()
	if _, err := conn.Write(appendRequest(nil, t)); err != nil {
		return fmt.Errorf("forward to %s: %w", t, cause(ctx, err))
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("forward to %s: %w", t, cause(ctx, err))
	}
	if !stop() && ctx.Err() != nil {
		return fmt.Errorf("forward to %s: %w", t, context.Cause(ctx))
	}
	if answer[0] != 0 {
		return fmt.Errorf("forward to %s: in the guest: %w", t, syscall.Errno(answer[0]))
	}
	return nil
}

// cause prefers why ctx ended to the deadline error that followed from it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func appendRequest(b []byte, t Target) []byte {
	addr, port := t.Addr.AsSlice(), t.Port
	if t.Network == Accepted {
		addr, port = binary.BigEndian.AppendUint64(nil, t.Connection), uint16(t.Refusal)
	}
	b = append(b, magic...)
	b = append(b, byte(t.Network), byte(len(addr)))
	b = append(b, addr...)
	return binary.BigEndian.AppendUint16(b, port)
}

// ReadRequest is the first half of the guest's end: it reads a valid target from
// a fresh connection, and nothing of what follows. The caller connects to it and
// then calls Answer.
func ReadRequest(conn net.Conn) (Target, error) {
	conn.SetReadDeadline(time.Now().Add(handshakeTimeout)) //nolint:errcheck // a closed conn fails in the read
	defer conn.SetReadDeadline(time.Time{})                //nolint:errcheck // likewise
	t, err := readRequest(conn)
	if err != nil {
		return Target{}, fmt.Errorf("read forward handshake: %w", err)
	}
	return t, nil
}

func readRequest(r io.Reader) (Target, error) {
	var b [prefix + 16 + 2]byte
	if _, err := io.ReadFull(r, b[:prefix]); err != nil {
		return Target{}, err
	}
	network, size := Network(b[len(magic)]), int(b[prefix-1])
	known := size == 0 || size == 4 || size == 16
	if network == Accepted {
		known = size == 8
	}
	if string(b[:len(magic)]) != magic || !known {
		return Target{}, ErrHandshake
	}
	rest := b[prefix : prefix+size+2]
	if _, err := io.ReadFull(r, rest); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Target{}, err
	}
	t := Target{Network: network}
	switch port := binary.BigEndian.Uint16(rest[size:]); {
	case network == Accepted:
		t.Connection, t.Refusal = binary.BigEndian.Uint64(rest), syscall.Errno(port)
	default:
		t.Addr, _ = netip.AddrFromSlice(rest[:size]) // of none the zero Addr
		t.Port = port
	}
	if err := t.Validate(); err != nil {
		return Target{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	return t, nil
}

// Answer tells the host what came of the connect: nil, or an error that wraps a
// syscall.Errno. An error that does not is EIO to the host.
func Answer(conn net.Conn, err error) error {
	_, werr := conn.Write([]byte{answer(err)})
	return werr
}

func answer(err error) byte {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	switch {
	case !errors.As(err, &errno), errno == 0, errno > 255:
		return byte(syscall.EIO)
	}
	return byte(errno)
}
