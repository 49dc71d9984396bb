// Package hypertest is what tests of the layers above a hypervisor need: a VM
// that is a function in this process, and the suite that every backend passes.
package hypertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
)

// A Loopback boots VMs whose guest is a function in this process, over socket
// pairs: everything but the machine is real.
type Loopback struct {
	// Guest is the guest's whole life. Its return powers the VM off; an error is
	// why. ctx ends when the VM is stopped.
	Guest func(ctx context.Context, g *GuestEnd) error
	// Resize, if not nil, tells what the VM has after it was to have want, which is
	// possible, and what is missing. Otherwise it has that.
	Resize func(want hypervisor.Size) (hypervisor.Size, error)
}

// Check implements hypervisor.Hypervisor.
func (*Loopback) Check(context.Context) (hypervisor.Capabilities, error) {
	return hypervisor.Capabilities{
		Version:     hypervisor.Capability{Value: "loopback"},
		Accelerator: hypervisor.Capability{Value: "tcg"},
		Channel:     hypervisor.Capability{Value: "virtio-serial"},
	}, nil
}

// Start implements hypervisor.Hypervisor.
func (l *Loopback) Start(_ context.Context, cfg hypervisor.Config) (hypervisor.VM, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	g := &GuestEnd{Config: cfg, ctx: ctx, control: make(chan net.Conn), ports: map[uint32]*listener{}}
	g.cond.L = &g.mu
	g.size, g.memory = hypervisor.Size{VCPUs: cfg.VCPUs, MemoryMiB: cfg.MemoryMiB}, cfg.MemoryMiB
	for i, d := range cfg.Devices {
		if err := g.plug(d); err != nil {
			cancel(err)
			return nil, fmt.Errorf("device %d: %w", i, err)
		}
	}
	if cfg.Started != nil {
		// The monitor is this process: recorded, it would be killed.
		if err := cfg.Started(hypervisor.Process{Name: "loopback", PID: os.Getpid()}); err != nil {
			cancel(err)
			return nil, err
		}
	}
	v := &VM{guest: g, resize: l.Resize, cancel: cancel, done: make(chan struct{})}
	go func() {
		err := l.Guest(ctx, g)
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		switch {
		case errors.Is(err, errStopped):
			err = nil
		case err == nil:
			err = errors.New("the guest has powered itself off")
		}
		cancel(errStopped)
		g.close()
		v.err = err
		close(v.done)
	}()
	return v, nil
}

var (
	errStopped = errors.New("stopped")
	errEnded   = errors.New("the VM has ended")
)

// A VM is a Loopback's.
type VM struct {
	guest  *GuestEnd
	resize func(hypervisor.Size) (hypervisor.Size, error)
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error
}

// PID implements hypervisor.VM: this process's own.
func (v *VM) PID() int { return os.Getpid() }

// Accept implements hypervisor.VM.
func (v *VM) Accept(ctx context.Context) (net.Conn, error) {
	if ctx.Err() != nil { // a select would choose at random
		return nil, context.Cause(ctx)
	}
	select {
	case c := <-v.guest.control:
		return c, nil
	case <-v.done:
		return nil, v.ended()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Dial implements hypervisor.VM; it waits for the guest to listen,
// and where it is paused to be resumed.
func (v *VM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	ln, err := v.guest.await(ctx, port)
	if errors.Is(err, errEnded) {
		<-v.done
		return nil, v.ended()
	}
	if err != nil {
		return nil, err
	}
	host, guest, err := pair()
	if err != nil {
		return nil, err
	}
	select {
	case ln.conns <- guest:
		return host, nil
	case <-v.done:
		err = v.ended()
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-ln.closed:
		err = fmt.Errorf("guest port %d: %w", port, unix.ECONNRESET)
	}
	return nil, errors.Join(err, host.Close(), guest.Close())
}

func (v *VM) ended() error {
	if v.err != nil {
		return v.err
	}
	return errEnded
}

// Stop implements hypervisor.VM.
func (v *VM) Stop(context.Context) error {
	v.cancel(errStopped)
	<-v.done
	return nil
}

// Crash ends the VM as a monitor's death would, with err as the reason.
func (v *VM) Crash(err error) {
	v.cancel(err)
	<-v.done
}

// Done implements hypervisor.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err implements hypervisor.VM.
func (v *VM) Err() error {
	select {
	case <-v.done:
		return v.err
	default:
		return nil
	}
}

// A GuestEnd is the guest's side of a Loopback's VM.
type GuestEnd struct {
	Config hypervisor.Config

	ctx     context.Context //nolint:containedctx // the VM's lifetime
	control chan net.Conn

	mu      sync.Mutex
	cond    sync.Cond // a port, a device, or the size has changed, or the guest has ended
	ports   map[uint32]*listener
	devices []hypervisor.Device
	conns   []net.Conn
	closed  bool
	sizing
}

// DialControl makes the control connection to the host.
func (g *GuestEnd) DialControl(ctx context.Context) (net.Conn, error) {
	host, guest, err := pair()
	if err != nil {
		return nil, err
	}
	g.keep(guest)
	select {
	case g.control <- host:
		return guest, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-g.ctx.Done():
		err = context.Cause(g.ctx)
	}
	return nil, errors.Join(err, host.Close(), guest.Close())
}

// Listen takes connections of the host to a guest port.
func (g *GuestEnd) Listen(port uint32) (net.Listener, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ports[port] != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, unix.EADDRINUSE)
	}
	ln := &listener{guest: g, port: port, conns: make(chan net.Conn), closed: make(chan struct{})}
	g.ports[port] = ln
	g.cond.Broadcast()
	return ln, nil
}

// keep closes conn when the VM ends, as a machine's end would.
func (g *GuestEnd) keep(conn net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		conn.Close() //nolint:errcheck // the machine has ended
		return
	}
	g.conns = append(g.conns, conn)
}

func (g *GuestEnd) await(ctx context.Context, port uint32) (*listener, error) {
	defer context.AfterFunc(ctx, g.cond.Broadcast)()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.ports[port] == nil || g.paused {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if g.closed {
			return nil, errEnded
		}
		g.cond.Wait()
	}
	return g.ports[port], nil
}

func (g *GuestEnd) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.trim(0)
	for _, c := range g.conns {
		c.Close() //nolint:errcheck // the guest may have closed it
	}
	g.cond.Broadcast()
}

type listener struct {
	guest  *GuestEnd
	port   uint32
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		l.guest.keep(c)
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-l.guest.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.guest.mu.Lock()
	defer l.guest.mu.Unlock()
	delete(l.guest.ports, l.port)
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr {
	return &net.UnixAddr{Name: fmt.Sprintf("loopback:%d", l.port), Net: "unix"}
}

// pair returns two connected sockets that half-close.
func pair() (net.Conn, net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "loopback")
		conns[i], err = net.FileConn(f)
		f.Close() //nolint:errcheck // FileConn has its own
		if err != nil {
			return nil, nil, fmt.Errorf("make a socket pair: %w", err)
		}
	}
	return conns[0], conns[1], nil
}
