// Package shim serves containerd's task API for one sandbox: it decodes, calls
// virtcontainers and maps the error.
package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"

	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/virtcontainers"
)

const (
	// stopTimeout is below the 3 s that containerd waits for a Shutdown; what
	// is left of the sandbox then is killed.
	stopTimeout = 2 * time.Second
	// flushTimeout bounds the delivery of the last events.
	flushTimeout = 500 * time.Millisecond
	// replyTimeout bounds the delivery of the last replies.
	replyTimeout = time.Second
)

// What the service needs of a sandbox. Its real ones are virtcontainers'.
type (
	sandbox interface {
		PID() int
		CreateContainer(ctx context.Context, c virtcontainers.ContainerConfig) (container, error)
		OOMs() <-chan string
		Stop(ctx context.Context) error
	}
	container interface {
		Init() initProcess
		Exec(ctx context.Context, id string, spec *specs.Process, io virtcontainers.Stdio) (execProcess, error)
		Processes(ctx context.Context) ([]virtcontainers.ProcessInfo, error)
		Delete(ctx context.Context) (virtcontainers.Exit, error)
	}
	initProcess interface {
		Start(ctx context.Context) error
		Kill(ctx context.Context, signal uint32, all bool) error
		Resize(ctx context.Context, columns, rows uint32) error
		State() virtcontainers.ProcessState
		Exited() <-chan struct{}
		Exit() virtcontainers.Exit
	}
	execProcess interface {
		initProcess
		Delete(ctx context.Context) (virtcontainers.Exit, error)
	}
	publisher interface {
		Publish(ev huskevents.Event)
		Close(ctx context.Context) error
	}
)

type realSandbox struct{ *virtcontainers.Sandbox }

func (s realSandbox) CreateContainer(ctx context.Context, cfg virtcontainers.ContainerConfig) (container, error) {
	c, err := s.Sandbox.CreateContainer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return realContainer{c}, nil
}

type realContainer struct{ *virtcontainers.Container }

func (c realContainer) Init() initProcess { return c.Container.Init() }

func (c realContainer) Exec(ctx context.Context, id string, spec *specs.Process, io virtcontainers.Stdio) (execProcess, error) {
	p, err := c.Container.Exec(ctx, id, spec, io)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// A Service is the task service of one sandbox.
type Service struct {
	sandbox   sandbox
	events    publisher
	namespace string

	// background counts the goroutines that watch the sandbox; they end once done
	// is closed, when the sandbox has been stopped.
	background sync.WaitGroup
	done       chan struct{}
	shutdown   chan struct{} // closed when containerd has asked for the end
	askedOnce  sync.Once
	stopOnce   sync.Once
	stopErr    error

	mu      sync.Mutex
	unlink  func() error     // takes the socket's name away; nil: it has none
	stopped bool             // nothing goes to the background any more
	tasks   map[string]*task // nil while one is being created
}

// New returns the service of a sandbox of that containerd namespace. The service
// owns sandbox and events: Serve ends them.
func New(s *virtcontainers.Sandbox, events *huskevents.Publisher, namespace string) *Service {
	return newService(realSandbox{s}, events, namespace)
}

func newService(s sandbox, events publisher, namespace string) *Service {
	return &Service{
		sandbox: s, events: events, namespace: namespace,
		done: make(chan struct{}), shutdown: make(chan struct{}), tasks: map[string]*task{},
	}
}

// Serve answers on l until a Shutdown finds no task left, or ctx ends, which
// ends every task. Where l has a method Unlink, that takes away its name before
// the Shutdown is answered: from then on containerd may start another shim of the
// same name. ready is called once calls are taken. When it returns, the
// sandbox has been stopped and the events have been delivered.
func (s *Service) Serve(ctx context.Context, l net.Listener, ready func() error) (err error) {
	defer func() { err = errors.Join(err, s.stop()) }()
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()))
	if err != nil {
		return fmt.Errorf("serve tasks: %w", err)
	}
	s.register(server)
	if u, ok := l.(interface{ Unlink() error }); ok {
		s.mu.Lock()
		s.unlink = u.Unlink
		s.mu.Unlock()
	}
	s.watch(s.watchOOMs)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(ctx), l) }()
	if err := ready(); err != nil {
		return errors.Join(fmt.Errorf("tell containerd that tasks are served: %w", err), server.Close(), ended(<-served))
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve tasks: %w", err)
	case <-ctx.Done():
		slog.Info("shim is told to end: stopping the sandbox")
	case <-s.shutdown:
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
		err := s.sandbox.Stop(ctx)
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

// watchOOMs publishes which containers ran out of memory.
func (s *Service) watchOOMs() {
	for {
		select {
		case id := <-s.sandbox.OOMs():
			s.events.Publish(&events.TaskOOM{ContainerID: id})
		case <-s.done:
			return
		}
	}
}

// task returns the task of that id, or NotFound.
func (s *Service) task(id string) (*task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
}

// process returns a task and its init or, with an exec id, one of its execs.
func (s *Service) process(id, execID string) (*task, *process, error) {
	t, err := s.task(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := t.process(execID)
	return t, p, err
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
