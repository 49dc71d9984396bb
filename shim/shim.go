// Package shim serves containerd's task API and sandbox API for one sandbox: it
// decodes, calls virtcontainers and maps the error.
package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/shim/callers"
	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/shim/transfer"
	"github.com/husk-containers/husk/virtcontainers"
)

const (
	// stopTimeout is below the 3 s that containerd waits for a Shutdown; what
	// is left of the sandbox then is killed.
	stopTimeout = 2 * time.Second
	// flushTimeout bounds the delivery of the last events.
	flushTimeout = 500 * time.Millisecond
	// replyTimeout bounds the delivery of the last replies, and how long clients
	// may stay after a Shutdown.
	replyTimeout = time.Second
	// createTimeout is what containerd has for CreateSandbox, which it calls at once.
	createTimeout = time.Minute
)

// Config is what a Service is made of.
type Config struct {
	// ID is that of the container or pod that the shim was started for; Namespace
	// is containerd's.
	ID, Namespace string
	// Hold is set where the shim was started for a pod by the sandbox API: there is
	// no sandbox before CreateSandbox, and it lives until ShutdownSandbox.
	// Otherwise there is one from the beginning, which lives until a Shutdown finds
	// no task left.
	Hold bool
	// Start makes the one sandbox and begins to boot it. What it returned last is
	// the service's to stop.
	Start func(ctx context.Context, cfg SandboxConfig) (*virtcontainers.Sandbox, error)
	// Leave has the shim outlive its bundle.
	Leave func() error
	// Events is the service's to close.
	Events *huskevents.Publisher
}

// SandboxConfig says what sandbox is asked for.
type SandboxConfig struct {
	// Hold is set for a pod by the sandbox API; otherwise the bundle's spec says
	// everything, and the rest is empty.
	Hold bool
	// NetNS is the path of the pod's network namespace; empty: there is none.
	NetNS string
	// Pod is what CRI says of the pod; its zero value where the client is not CRI.
	Pod pod.Config
}

// A Service serves the task API and the sandbox API of one sandbox.
type Service struct {
	id, namespace string
	hold          bool
	patience      time.Duration // for CreateSandbox; see giveUp
	startVM       starter
	leave         func() error
	events        publisher
	shim          *task.Shim // what the tasks have of the service
	transfers     *transfer.Service

	// background counts the goroutines that watch the sandbox; they end once done
	// is closed, when the sandbox has been stopped.
	background sync.WaitGroup
	done       chan struct{}
	shutdown   chan struct{} // closed when containerd has asked for the end
	askedOnce  sync.Once
	stopOnce   sync.Once
	stopErr    error

	mu      sync.Mutex
	unlink  func() error          // takes the socket's name away; nil: it has none
	ending  bool                  // no sandbox is made any more
	stopped bool                  // nothing goes to the background any more
	tasks   map[string]*task.Task // nil while one is being created
	pod     lifecycle
}

// New returns the service of what cfg says. Where that is no pod by the sandbox API
// the sandbox is made at once. On error the events are closed.
func New(ctx context.Context, cfg Config) (*Service, error) {
	start := func(ctx context.Context, c SandboxConfig) (sandbox, error) {
		sb, err := cfg.Start(ctx, c)
		if err != nil {
			return nil, err
		}
		return realSandbox{sb}, nil
	}
	return newService(ctx, cfg, start, cfg.Events)
}

func newService(ctx context.Context, cfg Config, start starter, events publisher) (*Service, error) {
	s := &Service{
		id: cfg.ID, namespace: cfg.Namespace, hold: cfg.Hold, patience: createTimeout, startVM: start, leave: cfg.Leave, events: events,
		done: make(chan struct{}), shutdown: make(chan struct{}), tasks: map[string]*task.Task{},
	}
	s.shim = &task.Shim{
		Namespace: s.namespace, Publish: events.Publish, Watch: s.watch, Done: s.done, Deleted: s.deleted, Wake: s.wake,
	}
	s.transfers = transfer.New(s.files)
	if s.hold {
		return s, nil
	}
	if err := s.makeSandbox(ctx, SandboxConfig{}); err != nil {
		return nil, errors.Join(err, events.Close(ctx))
	}
	_, err := s.beginStart() // the task API knows none
	return s, err
}

// Serve answers on l until a Shutdown finds nothing left, a ShutdownSandbox, or ctx
// ends, which ends every task. Where l has a method Unlink, that takes away its name before
// the Shutdown is answered: from then on containerd may start another shim of the
// same name. ready is called once calls are taken. When it returns, the
// sandbox has been stopped and the events have been delivered.
func (s *Service) Serve(ctx context.Context, l net.Listener, ready func() error) (err error) {
	defer func() { err = errors.Join(err, s.stop()) }()
	clients := &callers.Callers{Admit: ttrpc.UnixSocketRequireSameUser()}
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(clients))
	if err != nil {
		return fmt.Errorf("serve containerd: %w", err)
	}
	s.register(server)
	if u, ok := l.(interface{ Unlink() error }); ok {
		s.mu.Lock()
		s.unlink = u.Unlink
		s.mu.Unlock()
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(ctx), l) }()
	if err := ready(); err != nil {
		return errors.Join(fmt.Errorf("tell containerd that its calls are served: %w", err), server.Close(), ended(<-served))
	}
	if s.hold {
		defer time.AfterFunc(s.patience, s.giveUp).Stop()
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve containerd: %w", err)
	case <-ctx.Done():
		slog.Info("shim is told to end: stopping the sandbox")
	case <-s.shutdown:
		wctx, cancel := context.WithTimeout(ctx, replyTimeout)
		clients.Wait(wctx)
		cancel()
	}
	// A Shutdown has stopped everything before it was answered.
	err = s.stop()
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), replyTimeout)
	defer cancel()
	if server.Shutdown(rctx) != nil {
		server.Close() //nolint:errcheck // a client that holds a call open has none from here on
	}
	return errors.Join(err, ended(<-served))
}

func ended(err error) error {
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

// stop ends the sandbox and delivers the events of that.
func (s *Service) stop() error {
	s.stopOnce.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		s.mu.Lock()
		s.ending = true
		s.mu.Unlock()
		err := s.stopSandbox(ctx)
		s.transfers.Close(ctx) // with the sandbox they have lost their other end
		s.mu.Lock()
		s.stopped = true
		unlink := s.unlink
		s.mu.Unlock()
		if unlink != nil {
			err = errors.Join(err, unlink())
		}
		close(s.done)
		s.background.Wait()
		fctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		s.stopErr = errors.Join(err, s.events.Close(fctx))
	})
	return s.stopErr
}

// watch runs f in the background, and reports whether it does: once the sandbox
// has been stopped there is nothing to watch.
func (s *Service) watch(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.background.Go(f)
	}
	return !s.stopped
}

// task returns the task of that id, or NotFound.
func (s *Service) task(id string) (*task.Task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
}

// reserve takes a task's id for one that is being created.
func (s *Service) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.tasks[id]; ok {
		return fmt.Errorf("task %q: %w", id, errdefs.ErrAlreadyExists)
	}
	s.tasks[id] = nil
	return nil
}

// release gives a task's id back and returns how many are left.
func (s *Service) release(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tasks, id)
	return len(s.tasks)
}
