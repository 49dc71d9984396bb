package shim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/shim/stdio"
	"github.com/husk-containers/husk/virtcontainers"
)

// execGrace is how long the exit of a task waits to be told for those of its
// execs, which end with it: a client that does not read an exec's output must not
// hold it back for ever.
const execGrace = 5 * time.Second

// A task is a container as containerd sees it.
//
// What is told of a process comes in this order, whatever the races: its start
// before its exit, and the exits of execs before that of the task. So the exit of
// a process is held back until it was told of its start, and to clients the
// process runs until its exit was told.
type task struct {
	id, bundle string
	place      pod.Place
	container  container
	init       *process
	// deleted is closed when a Delete has ended.
	deleted chan struct{}

	mu sync.Mutex
	// execs by id; nil while one is being added.
	execs map[string]*process
	// ended is set when the init has exited: no exec is started any more.
	ended bool
}

// A process is a task's init or one of its execs.
type process struct {
	initProcess
	exec    execProcess // nil for an init
	id      string      // the exec id, empty for an init
	pid     uint32
	uris    stdio.URIs
	streams *stdio.Streams

	// told is closed when the exit was told, or never will be.
	told chan struct{}

	mu sync.Mutex
	// starting is open while the process is being started and its start has not
	// been told; nil before.
	starting chan struct{}
	// failed is set for an exec that could not be started, or not in time.
	failed bool
}

// process returns the init, or with an exec id that exec, or NotFound.
func (t *task) process(execID string) (*process, error) {
	if execID == "" {
		return t.init, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("exec %q of task %q: %w", execID, t.id, errdefs.ErrNotFound)
}

// reserve takes an exec's id for one that is being added.
func (t *task) reserve(execID string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.execs[execID]; ok {
		return fmt.Errorf("exec %q of task %q: %w", execID, t.id, errdefs.ErrAlreadyExists)
	}
	t.execs[execID] = nil
	return nil
}

// set puts an exec in the place of its reservation; nil gives that back.
func (t *task) set(execID string, p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p == nil {
		delete(t.execs, execID)
		return
	}
	if t.ended {
		p.abandon(true)
	}
	t.execs[execID] = p
}

// begin marks a process as being started. It is FailedPrecondition where it was
// before, and for an exec once the task has ended.
func (t *task) begin(p *process) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.exec != nil && t.ended:
		return fmt.Errorf("start exec %q: task %q has exited: %w", p.id, t.id, errdefs.ErrFailedPrecondition)
	case p.starting != nil:
		return fmt.Errorf("start %s: it was started before: %w", t.name(p), errdefs.ErrFailedPrecondition)
	}
	p.starting = make(chan struct{})
	return nil
}

func (t *task) name(p *process) string {
	if p.exec == nil {
		return fmt.Sprintf("task %q", t.id)
	}
	return fmt.Sprintf("exec %q of task %q", p.id, t.id)
}

// start starts a process and tells of it.
func (s *Service) start(ctx context.Context, t *task, p *process) error {
	if err := t.begin(p); err != nil {
		return err
	}
	defer close(p.starting)
	err := p.streams.OpenStdin()
	if err == nil {
		err = p.Start(ctx)
	}
	switch {
	case p.exec == nil && err == nil:
		s.events.Publish(&events.TaskStart{ContainerID: t.id, Pid: p.pid})
	case p.exec == nil: // watchInit tells whether it exited over it
	case err == nil:
		s.events.Publish(&events.TaskExecStarted{ContainerID: t.id, ExecID: p.id, Pid: p.pid})
		if !s.watch(func() { s.watchExec(t, p) }) {
			close(p.told)
		}
	default:
		p.mu.Lock()
		p.failed = true
		p.mu.Unlock()
		close(p.told)
	}
	return err
}

// watchExec tells of the exit of an exec that was started.
func (s *Service) watchExec(t *task, p *process) {
	defer close(p.told)
	if s.awaitExit(p) {
		p.streams.Drain()
		s.tell(t, p)
	}
}

// watchInit tells of the exit of a task, after its start and its execs' exits.
func (s *Service) watchInit(t *task) {
	defer close(t.init.told)
	if !s.awaitExit(t.init) {
		return
	}
	t.init.streams.Drain()
	timer := time.NewTimer(execGrace)
	defer timer.Stop()
	for _, told := range t.end() {
		select {
		case <-told:
		case <-timer.C:
			timer.Reset(0)
		}
	}
	s.tell(t, t.init)
}

// awaitExit waits for a process to exit. It is false where the sandbox was
// stopped and the process was deleted before.
func (s *Service) awaitExit(p *process) bool {
	select {
	case <-p.Exited():
		return true
	case <-s.done:
	}
	select {
	case <-p.Exited():
		return true
	default:
		return false
	}
}

// end marks the task as ended and returns what its exit has to wait for. Who waits
// for an exec that was not started waits no more.
func (t *task) end() (wait []<-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	for _, p := range t.execs {
		if p == nil {
			continue
		}
		p.abandon(true)
		wait = append(wait, p.told)
	}
	t.init.mu.Lock()
	defer t.init.mu.Unlock()
	if t.init.starting != nil {
		wait = append(wait, t.init.starting)
	}
	return wait
}

func (s *Service) tell(t *task, p *process) {
	exit := p.Exit()
	id := p.id
	if p.exec == nil {
		id = t.id
	}
	s.events.Publish(&events.TaskExit{
		ContainerID: t.id, ID: id, Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At),
	})
}

// abandon ends the waiting for an exec that is not started and will not be: it has
// failed, or was deleted.
func (p *process) abandon(failed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.starting == nil {
		p.starting = make(chan struct{})
		p.failed = failed
		close(p.starting)
		close(p.told)
	}
}

// awaitTold waits until the exit of a process was told.
func (p *process) awaitTold(ctx context.Context) error {
	select {
	case <-p.told:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// state is the process's as clients see it: it runs until its exit was told, and is
// stopped while a Delete is at work.
func (p *process) state() virtcontainers.ProcessState {
	state := p.State()
	if state != virtcontainers.Stopped && state != virtcontainers.Deleted {
		return state
	}
	select {
	case <-p.told:
		return virtcontainers.Stopped
	default:
		return virtcontainers.Running
	}
}

// deletedBefore makes an error of a Delete's that came second: once the first has
// ended, since clients take the task's bundle away then, it is NotFound.
func (t *task) deletedBefore(ctx context.Context, p *process, err error) error {
	if p.State() != virtcontainers.Deleted {
		return err
	}
	if p.exec == nil {
		select {
		case <-t.deleted:
		case <-ctx.Done():
			return fmt.Errorf("delete %s, which another call does: %w", t.name(p), context.Cause(ctx))
		}
	}
	return fmt.Errorf("delete %s: another call did: %w", t.name(p), errdefs.ErrNotFound)
}

// exit is how the process ended; for an exec that could not be started, that
// nobody knows.
func (p *process) exit() virtcontainers.Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failed {
		return virtcontainers.Exit{Status: 255}
	}
	return p.Exit()
}

// sandboxPids lists the one process of a container that runs nothing: the VM's
// monitor, until the task has exited. containerd takes a task without processes for
// one that was left behind, and removes it when it starts.
func (t *task) sandboxPids() *api.PidsResponse {
	resp := &api.PidsResponse{}
	if t.init.state() != virtcontainers.Stopped {
		resp.Processes = []*taskapi.ProcessInfo{{Pid: t.init.pid}}
	}
	return resp
}
