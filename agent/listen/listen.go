// Package listen tells which TCP ports the guest's processes listen on and which
// UDP ports they bind, as the kernel sees it happen.
//
// Four small BPF programs on the root of the cgroup hierarchy, which the agent
// needs no tracing for and no library, keep a table of sockets in the kernel:
//
//	sock_ops, TCP_LISTEN_CB  listen(2) has succeeded    add     TCP
//	sock_ops, STATE_CB       LISTEN is left             delete  TCP
//	bind4, bind6             bind(2) names a port       add     UDP
//	inet_sock_release        the socket is closed       delete  UDP
//
// Of a multipath TCP listener the kernel's own socket is seen, which is never
// released by a process: hence the two ways to delete.
//
// Each change wakes the agent by a ring buffer; it then reads the whole table and
// reports how it differs from what it last read. Nothing is lost but what did not
// last, and nothing the size of the ring or of a backlog could change that.
//
// Limits. A UDP socket that has its port from the kernel (no bind, or one to port
// 0) is a client's and not reported. One whose bind has failed is reported until
// it is closed. Sockets of network namespaces that containers make are left out. Of more
// than 1024 sockets the later ones are not reported.
package listen

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// maxSockets bounds the table.
const maxSockets = 1024

// A Watcher watches the sockets of the guest's own network namespace.
type Watcher struct {
	table *table
	netns uint64 // cookie of the agent's
}

// Open begins to watch the sockets made from now on by processes in and below
// cgroup, a directory of the v2 hierarchy. Run must follow.
func Open(cgroup string) (*Watcher, error) {
	netns, err := netnsCookie()
	if err == nil {
		var t *table
		if t, err = openTable(cgroup); err == nil {
			return &Watcher{table: t, netns: netns}, nil
		}
	}
	return nil, fmt.Errorf("watch listeners (needed of the guest's kernel: CONFIG_CGROUP_BPF): %w", err)
}

// Run calls report for each port that is taken and for each that is given up,
// until ctx ends, and then closes the Watcher and returns nil. A port that several
// sockets share is given up by the last.
func (w *Watcher) Run(ctx context.Context, report func(*agentv1.ListenEvent)) error {
	defer w.table.close()
	stop := context.AfterFunc(ctx, w.table.interrupt)
	defer stop()
	var known []endpoint
	for {
		sockets, err := w.table.read()
		if err == nil {
			now := w.endpoints(sockets)
			for _, e := range changes(known, now) {
				report(e)
			}
			known = now
			err = w.table.wait()
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch listeners: %w", err)
		}
	}
}

// An endpoint is what a socket listens on.
type endpoint struct {
	protocol agentv1.ListenEvent_Protocol
	addr     netip.Addr
	port     uint16
}

func (e endpoint) compare(o endpoint) int {
	return cmp.Or(cmp.Compare(e.protocol, o.protocol), cmp.Compare(e.port, o.port), e.addr.Compare(o.addr))
}

func (e endpoint) event(closed bool) *agentv1.ListenEvent {
	return &agentv1.ListenEvent{Protocol: e.protocol, Address: e.addr.String(), Port: uint32(e.port), Closed: closed}
}

// changes are the events that lead from one sorted set of endpoints to another:
// first what is closed, so that a port which changes hands is free.
func changes(from, to []endpoint) []*agentv1.ListenEvent {
	var events []*agentv1.ListenEvent
	missing := func(from, to []endpoint, closed bool) {
		for _, e := range from {
			if _, found := slices.BinarySearchFunc(to, e, endpoint.compare); !found {
				events = append(events, e.event(closed))
			}
		}
	}
	missing(from, to, true)
	missing(to, from, false)
	return events
}

// endpoints are those of the sockets in the agent's network namespace, sorted.
func (w *Watcher) endpoints(sockets []socket) []endpoint {
	var all []endpoint
	for _, s := range sockets {
		if e, ok := s.endpoint(); ok && s.netns() == w.netns {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, endpoint.compare)
	return slices.Compact(all)
}

// A socket is a value of the table, as the programs store it:
//
//	0       8        24     28       30         32
//	| netns | address | port | family | protocol |
//
// An IPv4 address takes the first 4 bytes of its field, in network order; the
// rest is numbers of this machine.
type socket [32]byte

func (s *socket) netns() uint64 { return binary.NativeEndian.Uint64(s[:]) }

func (s *socket) endpoint() (e endpoint, ok bool) {
	port := binary.NativeEndian.Uint32(s[24:])
	e.port = uint16(port)
	switch binary.NativeEndian.Uint16(s[28:]) {
	case unix.AF_INET:
		e.addr = netip.AddrFrom4([4]byte(s[8:12]))
	case unix.AF_INET6:
		e.addr = netip.AddrFrom16([16]byte(s[8:24])).Unmap()
	default:
		return e, false
	}
	switch binary.NativeEndian.Uint16(s[30:]) {
	case unix.IPPROTO_TCP:
		e.protocol = agentv1.ListenEvent_PROTOCOL_TCP
	case unix.IPPROTO_UDP:
		e.protocol = agentv1.ListenEvent_PROTOCOL_UDP
	default:
		return e, false
	}
	return e, e.port != 0
}

// netnsCookie returns the kernel's number of this network namespace.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("getsockopt SO_NETNS_COOKIE: %w", err)
	}
	return cookie, nil
}
