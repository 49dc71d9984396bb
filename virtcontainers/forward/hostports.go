package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
)

const (
	// maxListeners bounds the host's sockets that one guest can ask for.
	maxListeners = 1024
	// maxWarnings bounds what a guest can have logged.
	maxWarnings = 64
)

// HostPorts makes the ports that a guest on the host's network listens on
// reachable on the host: at the same address and port, in this process's network
// namespace. As under a runtime without a VM, a pod that is given the host's
// network may take any port of it, privileged ones and those of loopback included.
//
// The guest is not trusted with more than that: there are at most 1024 listeners,
// and what it says is checked. A port that is in use on the host is warned of, once,
// and stays the other's.
type HostPorts struct {
	log   *slog.Logger
	guest []netip.Addr
	proxy *proxy
	flows *packetFlows

	serving sync.WaitGroup
	// serve runs f until Close, which cancels its context and waits for it.
	serve  func(f func(context.Context))
	cancel context.CancelFunc

	// mu orders Apply and Close. No call that waits for the guest is made under it.
	mu        sync.Mutex
	closed    bool
	wanted    map[endpoint]struct{} // what the guest listens on
	listeners map[endpoint]func() error
	warned    map[endpoint]struct{}
}

// An endpoint is where a socket listens.
type endpoint struct {
	network forward.Network
	addr    netip.AddrPort
}

func (e endpoint) String() string { return fmt.Sprintf("%s %s", e.network, e.addr) }

// NewHostPorts returns HostPorts without a port. guest are the guest's own
// addresses, one of each family or none: what reaches a listener on all of the
// host's addresses by another way than loopback is delivered there, so that it
// does not look to a service as if it came from its own machine. Without one it
// goes to the guest's loopback.
func NewHostPorts(dial Dial, guest []netip.Addr, log *slog.Logger) *HostPorts {
	ctx, cancel := context.WithCancel(context.Background())
	h := &HostPorts{
		log: log, guest: guest, cancel: cancel,
		proxy: newProxy(dial, log), flows: newPacketFlows(dial, log),
		wanted:    make(map[endpoint]struct{}),
		listeners: make(map[endpoint]func() error),
		warned:    make(map[endpoint]struct{}),
	}
	h.serve = func(f func(context.Context)) { h.serving.Go(func() { f(ctx) }) }
	return h
}

// Apply follows what the guest tells of one of its ports. The calls come in the
// order of the events.
func (h *HostPorts) Apply(event *agentv1.ListenEvent) {
	e, err := parse(event)
	if err != nil {
		h.log.Debug("forward: port of the guest ignored", "err", err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, known := h.wanted[e]
	if h.closed || known != event.GetClosed() {
		return
	}
	if known {
		delete(h.wanted, e)
	} else {
		if len(h.wanted) >= maxListeners {
			h.warn(e, fmt.Errorf("the guest listens on more than %d ports", maxListeners))
			return
		}
		h.wanted[e] = struct{}{}
	}
	for _, e := range sockets(e) {
		h.follow(e)
	}
}

// parse checks what the guest says.
func parse(event *agentv1.ListenEvent) (endpoint, error) {
	addr, err := netip.ParseAddr(event.GetAddress())
	if err != nil {
		return endpoint{}, err
	}
	var network forward.Network
	switch event.GetProtocol() {
	case agentv1.ListenEvent_PROTOCOL_TCP:
		network = forward.TCP
	case agentv1.ListenEvent_PROTOCOL_UDP:
		network = forward.UDP
	}
	port := event.GetPort()
	if network == 0 || port == 0 || port > 65535 || addr.Zone() != "" || addr.IsMulticast() {
		return endpoint{}, fmt.Errorf("listener %s port %d of protocol %d", addr, port, event.GetProtocol())
	}
	return endpoint{network, netip.AddrPortFrom(addr.Unmap(), uint16(port))}, nil
}

// sockets are the host's sockets for an endpoint of the guest: of :: there are
// two, as such a socket takes IPv4 too. Whether this one does nobody tells; if not
// the guest refuses what comes there.
func sockets(e endpoint) []endpoint {
	if e.addr.Addr() == netip.IPv6Unspecified() {
		return []endpoint{e, {e.network, netip.AddrPortFrom(netip.IPv4Unspecified(), e.addr.Port())}}
	}
	return []endpoint{e}
}

// follow opens or closes the socket e as it is wanted. mu is held.
func (h *HostPorts) follow(e endpoint) {
	_, wanted := h.wanted[e]
	if e.addr.Addr() == netip.IPv4Unspecified() {
		_, dual := h.wanted[endpoint{e.network, netip.AddrPortFrom(netip.IPv6Unspecified(), e.addr.Port())}]
		wanted = wanted || dual
	}
	end, open := h.listeners[e]
	switch {
	case open && !wanted:
		delete(h.listeners, e)
		end() //nolint:errcheck // of a socket there is nothing to tell
	case wanted && !open:
		end, err := h.open(e)
		if errors.Is(err, unix.EAFNOSUPPORT) || e.addr.Addr().Is6() && errors.Is(err, unix.EADDRNOTAVAIL) && !e.addr.Addr().IsLoopback() {
			return // a host without IPv6
		}
		if err != nil {
			h.warn(e, err)
			return
		}
		h.listeners[e] = end
	}
}

// warn tells once of a port that cannot be had. mu is held.
func (h *HostPorts) warn(e endpoint, err error) {
	if _, done := h.warned[e]; done || len(h.warned) >= maxWarnings {
		return
	}
	h.warned[e] = struct{}{}
	if errors.Is(err, unix.EADDRINUSE) {
		err = errors.New("it is in use on the host")
	}
	h.log.Warn("port of the guest is not reachable on the host", "port", e.String(), "err", err)
}

// open listens on e and serves it until the function is called that it returns.
func (h *HostPorts) open(e endpoint) (func() error, error) {
	family := "6"
	if e.addr.Addr().Is4() {
		family = "4"
	}
	network := e.network.String() + family // of tcp6 and udp6 Go makes sockets of IPv6 alone
	config := net.ListenConfig{KeepAlive: -1}
	if e.network == forward.UDP {
		config.Control = packetInfo
		conn, err := config.ListenPacket(context.Background(), network, e.addr.String())
		if err != nil {
			return nil, err
		}
		udp := conn.(*net.UDPConn)
		h.serve(func(ctx context.Context) {
			h.flows.serve(ctx, udp, func(to netip.Addr) forward.Target { return h.target(e, to) })
		})
		return udp.Close, nil
	}
	ln, err := config.Listen(context.Background(), network, e.addr.String())
	if err != nil {
		return nil, err
	}
	h.serve(func(ctx context.Context) {
		h.proxy.serve(ctx, ln, func(conn *net.TCPConn) (forward.Target, error) {
			return h.target(e, conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()), nil
		})
	})
	return ln.Close, nil
}

// target is where in the guest goes what came to an address of the host by the
// socket e.
func (h *HostPorts) target(e endpoint, to netip.Addr) forward.Target {
	t := forward.Target{Network: e.network, Addr: e.addr.Addr(), Port: e.addr.Port()}
	if !t.Addr.IsUnspecified() {
		return t
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if t.Addr.Is6() {
		loopback = netip.IPv6Loopback()
	}
	if !to.IsLoopback() {
		for _, own := range h.guest {
			if own.Is4() == t.Addr.Is4() {
				t.Addr = own
				return t
			}
		}
	}
	t.Addr = loopback
	return t
}

// Close closes all sockets, resets their flows and returns when they are gone. It
// is idempotent.
func (h *HostPorts) Close() error {
	h.mu.Lock()
	h.closed = true
	listeners := h.listeners
	h.listeners = nil
	h.mu.Unlock()
	var errs []error
	for _, end := range listeners {
		errs = append(errs, end())
	}
	h.cancel()
	h.serving.Wait()
	h.proxy.flows.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close ports on the host: %w", err)
	}
	return nil
}

// packetInfo has a socket tell to which of the host's addresses each datagram
// came.
func packetInfo(network, _ string, raw syscall.RawConn) (err error) {
	level, option := unix.SOL_IP, unix.IP_PKTINFO
	if network == "udp6" {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVPKTINFO
	}
	cerr := raw.Control(func(fd uintptr) {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, option, 1))
	})
	return errors.Join(cerr, err)
}
