// Package agent is the guest's end of the control protocol: it holds the
// containers of one sandbox and serves the host that asks for them.
//
// It is a library: cmd/husk-agent runs it as PID 1 of a guest, and a test on the
// host runs it in its own process, with the runtime and platform of
// agent/agenttest.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/files"
	"github.com/husk-containers/husk/agent/forward"
	"github.com/husk-containers/husk/agent/socket"
	"github.com/husk-containers/husk/agent/stream"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	// shutdownTimeout bounds the wait for killed processes, and that for the
	// disks, of a Shutdown.
	shutdownTimeout = 5 * time.Second
	// answerTimeout bounds the wait for a host that has been answered Shutdown
	// to close the connection.
	answerTimeout = time.Second
	// deviceTimeout bounds the wait for the devices of a network, where the
	// host's own patience does not.
	deviceTimeout = 30 * time.Second
	// defaultShm is the size of the shared /dev/shm where the host names none.
	defaultShm = 64 << 20
)

// ErrDisconnected is returned by Serve when the control connection was lost.
var ErrDisconnected = errors.New("the host has closed the control connection")

// A Platform is what the agent does to the machine it runs on; agent/boot has
// the real one.
type Platform interface {
	SetHostname(name string) error
	SetClock(t time.Time) error
	// AddEntropy credits at most 512 bytes to the kernel's random pool.
	AddEntropy(b []byte) error
	SetSysctl(key, value string) error
	// SetNetwork makes the network what n, which is valid, says, and waits for
	// devices that have not appeared until ctx ends. Calls are served in turn.
	SetNetwork(ctx context.Context, n *agentv1.Network) error
	// MountShm mounts a /dev/shm with room for so many bytes on target, which it
	// makes.
	MountShm(target string, bytes uint64) error
	// MountStorage mounts s, which is valid, and makes what is missing of the
	// directories below it. It does not mind being called again, and neither does
	// UnmountStorage.
	MountStorage(ctx context.Context, s *agentv1.Storage, directories []*agentv1.Directory) error
	UnmountStorage(ctx context.Context, target string) error
	// MakeDevice makes d.Node. NotFound where the machine has no such device.
	MakeDevice(d agentv1.Device) error
	// SetPidsMax bounds the processes and threads of all containers together; 0: by
	// what the kernel bears.
	SetPidsMax(n uint64) error
	// Interfaces tells what went through each interface but loopback. It does not
	// block.
	Interfaces() ([]*agentv1.InterfaceStats, error)
	// Online takes CPUs into and out of use until so many are in use, waits until
	// the machine has so many bytes of memory, 0 asking for nothing, and fits what
	// containers may have to what there is then, and tells it. Where ctx is about to
	// end it does not wait any longer.
	Online(ctx context.Context, cpus int, memoryBytes uint64) (*agentv1.OnlineResourcesResponse, error)
	// Sync writes what is cached to the disks, and gives up after timeout.
	Sync(timeout time.Duration)
}

// An oomSource is a Runtime that can tell of processes killed for want of
// memory; see container.Crun.
type oomSource interface {
	WatchOOM(ctx context.Context, changed func(containerID string)) error
	TakeOOM(containerID string) bool
}

// Options are what an Agent is made of.
type Options struct {
	// Version of the agent, for Hello.
	Version string
	// Started is Uptime when the program began, for Hello.
	Started time.Duration
	// Runtime runs the containers.
	Runtime container.Runtime
	// Platform is the machine.
	Platform Platform
	// Streams accepts the host's stream connections (protocols/stream.Port).
	// Serve closes it.
	Streams net.Listener
	// Forwards accepts the host's flows (protocols/forward.Port); nil: there are
	// none. Serve closes it.
	Forwards net.Listener
	// Files accepts the host's operations on files (protocols/files.Port); nil:
	// there are none. Serve closes it.
	Files net.Listener
	// Listeners begins to watch the ports that processes listen on, when the host
	// asks for reports; nil: it cannot. See agent/listen.
	Listeners func() (ListenWatcher, error)
	// SocketsDir is where the sockets are made that stand for the host's; empty:
	// agentv1.SocketsDir.
	SocketsDir string
}

// A ListenWatcher is a listen.Watcher.
type ListenWatcher interface {
	Run(ctx context.Context, report func(*agentv1.ListenEvent)) error
}

// An Agent serves one host for one sandbox.
type Agent struct {
	opts   Options
	claims *stream.Claims
	events events
	listen chan ListenWatcher // to run, one at most
	// sockets stand for the host's.
	sockets *socket.Table

	shutdown     chan struct{} // closed when Shutdown has done its work
	shutdownOnce sync.Once

	calls    sync.WaitGroup // handlers that run
	watchers sync.WaitGroup // one for each process

	// mu guards what is below, and the fields of guest containers and
	// processes that say so. It is not held across any call that can block.
	mu         sync.Mutex
	ready      time.Duration // Uptime when Serve began
	configured bool
	closing    bool // no handler and no container is let in any more
	containers map[string]*guestContainer
}

// New returns an Agent. Serve runs it.
func New(opts Options) *Agent {
	a := &Agent{
		opts:       opts,
		claims:     stream.NewClaims(opts.Streams),
		listen:     make(chan ListenWatcher, 1),
		shutdown:   make(chan struct{}),
		containers: make(map[string]*guestContainer),
	}
	a.sockets = socket.New(cmp.Or(opts.SocketsDir, agentv1.SocketsDir), a.reportConnection)
	return a
}

// Serve serves the control connection, which it closes, until the host has asked
// for Shutdown and then closed it, or not done so for a second (nil), the
// connection is lost (ErrDisconnected), ctx ends (its cause), or streams or OOM
// events cannot be served any more. When it returns every process of every
// container has been killed and no goroutine is left; what the runtime has on
// disk is left. It is called once.
func (a *Agent) Serve(ctx context.Context, control net.Conn) error {
	ready := Uptime()
	a.mu.Lock()
	a.ready = ready
	a.mu.Unlock()

	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return fmt.Errorf("serve control connection: %w", err)
	}
	agentv1.RegisterAgentService(srv, service{a})

	// The end of ctx does not reach the handlers before the connection is closed:
	// what they would answer then is not about their containers.
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var background sync.WaitGroup
	failed := make(chan error, 5)
	run := func(f func(context.Context) error) {
		background.Go(func() {
			if err := f(inner); err != nil {
				failed <- err
			}
		})
	}
	run(a.claims.Serve)
	if source, ok := a.opts.Runtime.(oomSource); ok {
		run(func(ctx context.Context) error { return source.WatchOOM(ctx, a.checkOOM) })
	}
	if a.opts.Forwards != nil {
		run(func(ctx context.Context) error { return forward.Serve(ctx, a.opts.Forwards, a.sockets.Claim) })
	}
	run(a.sockets.Serve)
	if a.opts.Files != nil {
		run(func(ctx context.Context) error { return files.Serve(ctx, a.opts.Files, agentv1.CopiesDir, a) })
	}
	run(a.watchListeners)
	ln := newOneConn(control)
	quiet := logrus.New() // what ttrpc logs is that the connection has ended
	quiet.SetOutput(io.Discard)
	background.Go(func() {
		srv.Serve(log.WithLogger(inner, logrus.NewEntry(quiet)), ln) //nolint:errcheck // it ends with ln
	})

	select {
	case <-a.shutdown:
		// ttrpc does not tell when an answer is out. The host does, by closing
		// the connection.
		select {
		case <-ln.ctx.Done():
		case <-time.After(answerTimeout):
		case <-ctx.Done():
		}
	case <-ln.ctx.Done():
		select {
		case <-a.shutdown: // the host was quicker
		default:
			err = ErrDisconnected
		}
	case err = <-failed:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	control.Close()
	ln.Close()
	cancel()
	srv.Close() //nolint:errcheck // the listener is closed already
	a.close(context.WithoutCancel(ctx))
	background.Wait()
	return err
}

// close ends what Serve leaves: handlers, processes and their streams.
func (a *Agent) close(ctx context.Context) {
	a.mu.Lock()
	a.closing = true
	a.mu.Unlock()
	a.calls.Wait()
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	a.killAll(ctx)
	for _, p := range a.processes() {
		p.streams.Close()
	}
	if ctx.Err() == nil { // else there are processes that not even SIGKILL ends
		a.watchers.Wait()
	}
}

// enter lets a handler in, which calls a.calls.Done at its end.
func (a *Agent) enter() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closing {
		return fmt.Errorf("the guest is going down: %w", errdefs.ErrUnavailable)
	}
	a.calls.Add(1)
	return nil
}

// intercept is the edge: every request is validated, and every error gets its
// gRPC status.
func (a *Agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	if err := a.enter(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	defer a.calls.Done()
	answer, err := method(ctx, func(request any) error {
		if err := unmarshal(request); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if m, ok := request.(interface{ Validate() error }); ok {
			return m.Validate()
		}
		return nil
	})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return answer, nil
}

// killAll kills every process of every container and waits for them.
func (a *Agent) killAll(ctx context.Context) {
	a.mu.Lock()
	ids := make([]string, 0, len(a.containers))
	for id := range a.containers {
		ids = append(ids, id)
	}
	a.mu.Unlock()
	for _, id := range ids {
		logError(a.opts.Runtime.Kill(ctx, id, syscall.SIGKILL), "kill container", "container", id)
	}
	for _, p := range a.processes() {
		select {
		case <-p.Done():
		case <-ctx.Done():
			return
		}
	}
}

// Uptime is how long the machine has run, from the start of its kernel.
func Uptime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) //nolint:errcheck // the clock exists
	return time.Duration(ts.Nano())
}
