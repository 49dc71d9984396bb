package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/forward"
)

// A PortForward carries TCP connections that are made within a pod's network
// namespace, to its own addresses, to the guest. What comes to the pod from
// outside does not pass here, and no more does what leaves the namespace.
//
//	in the pod's netns                  shim             guest
//	connect(127.0.0.1:80)
//	  | nft output: redirect
//	  +-> proxy on 127.0.0.1:N --- "HSKF" 127.0.0.1:80 ---> connect, copy
//
// The proxy's sockets belong to the namespace, its goroutines to this process.
type PortForward struct {
	redirect *redirect
	lns      []net.Listener
	cancel   context.CancelFunc
	serving  sync.WaitGroup
	proxy    *proxy
	close    func() error
}

// Open begins to forward in the namespace ns, which it does not keep: it may be
// closed afterwards, but exists until Close. The guest is dialled for each
// connection. An error means that nothing is left there; a host without nftables
// is one of them. ctx bounds Open alone.
func Open(ctx context.Context, ns *os.File, dial Dial, log *slog.Logger) (*PortForward, error) {
	f := &PortForward{proxy: newProxy(dial, log)}
	ports, err := f.listen(ctx, ns)
	if err != nil {
		return nil, fmt.Errorf("forward ports of the pod: %w", err)
	}
	if f.redirect, err = newRedirect(ns, ports); err != nil {
		f.closeListeners() //nolint:errcheck // err is the reason
		return nil, fmt.Errorf("forward ports of the pod: %w", err)
	}
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f.cancel = cancel
	for _, ln := range f.lns {
		f.serving.Go(func() { f.proxy.serve(serving, ln, original) })
	}
	f.close = sync.OnceValue(f.closeAll)
	return f, nil
}

// Close closes the proxy, resets its connections and takes the redirect away, and
// returns when all of it is gone. It is idempotent.
func (f *PortForward) Close() error { return f.close() }

func (f *PortForward) closeAll() error {
	err := f.closeListeners()
	f.cancel()
	f.serving.Wait()
	f.proxy.flows.Wait()
	// Last, for the resets to be translated as all that went before.
	if err = errors.Join(err, f.redirect.close()); err != nil {
		return fmt.Errorf("end forwarding ports of the pod: %w", err)
	}
	return nil
}

func (f *PortForward) closeListeners() error {
	var errs []error
	for _, ln := range f.lns {
		errs = append(errs, ln.Close())
	}
	return errors.Join(errs...)
}

// proxyPorts are where the proxy listens on 127.0.0.1 and on ::1; v6 is 0 where
// the namespace has no IPv6.
type proxyPorts struct{ v4, v6 uint16 }

func (f *PortForward) listen(ctx context.Context, ns *os.File) (proxyPorts, error) {
	v4, err := listenIn(ctx, ns, "tcp4", "127.0.0.1:0")
	if err != nil {
		return proxyPorts{}, err
	}
	f.lns = append(f.lns, v4)
	v6, err := listenIn(ctx, ns, "tcp6", "[::1]:0")
	switch {
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
		return proxyPorts{v4: port(v4)}, nil
	case err != nil:
		f.closeListeners() //nolint:errcheck // err is the reason
		return proxyPorts{}, err
	}
	f.lns = append(f.lns, v6)
	return proxyPorts{v4: port(v4), v6: port(v6)}, nil
}

func port(ln net.Listener) uint16 { return uint16(ln.Addr().(*net.TCPAddr).Port) }

// listenIn listens with a socket of the network namespace ns.
func listenIn(ctx context.Context, ns *os.File, network, address string) (net.Listener, error) {
	type result struct {
		ln  net.Listener
		err error
	}
	done := make(chan result, 1)
	go func() { // its thread changes namespace
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			defer home.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			runtime.UnlockOSThread() // it is where it was
			done <- result{err: fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)}
			return
		}
		config := net.ListenConfig{KeepAlive: -1, Control: freebind}
		ln, err := config.Listen(ctx, network, address)
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with the goroutine
		done <- result{ln, err}
	}()
	r := <-done
	return r.ln, r.err
}

// freebind lets a socket have ::1 while lo is down.
func freebind(network, _ string, raw syscall.RawConn) error {
	if network != "tcp6" {
		return nil // 127.0.0.1 can be had at any time
	}
	return raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) //nolint:errcheck // then the bind fails
	})
}

// original returns where a redirected connection was going to.
func original(conn *net.TCPConn) (forward.Target, error) {
	addr, err := originalDst(conn)
	if err != nil {
		return forward.Target{}, fmt.Errorf("find where a redirected connection goes: %w", err)
	}
	t := forward.Target{Network: forward.TCP, Addr: addr.Addr(), Port: addr.Port()}
	if t.Addr == netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		t.Addr = netip.Addr{} // a service on ::1 alone answers too
	}
	return t, nil
}
