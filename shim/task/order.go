package task

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/husk-containers/husk/virtcontainers"
)

// execGrace is how long the exit of a task waits to be told for those of its
// execs, which end with it: a client that does not read an exec's output must not
// hold it back for ever.
const execGrace = 5 * time.Second

// begin marks a process as being started. It is FailedPrecondition where it was
// before, and for an exec once the task has ended.
func (t *Task) begin(p *process) error {
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

// start starts a process and tells of it.
func (t *Task) start(ctx context.Context, p *process) error {
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
		t.shim.Publish(&events.TaskStart{ContainerID: t.id, Pid: p.pid})
	case p.exec == nil: // watchInit tells whether it exited over it
	case err == nil:
		t.shim.Publish(&events.TaskExecStarted{ContainerID: t.id, ExecID: p.id, Pid: p.pid})
		if !t.shim.Watch(func() { t.watchExec(p) }) {
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
func (t *Task) watchExec(p *process) {
	defer close(p.told)
	if t.awaitExit(p) {
		p.streams.Drain()
		t.tell(p)
	}
}

// watchInit tells of the exit of a task, after its start and its execs' exits.
func (t *Task) watchInit() {
	defer close(t.init.told)
	if !t.awaitExit(t.init) {
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
	t.tell(t.init)
}

// awaitExit waits for a process to exit. It is false where the sandbox was
// stopped and the process was deleted before.
func (t *Task) awaitExit(p *process) bool {
	select {
	case <-p.Exited():
		return true
	case <-t.shim.Done:
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
func (t *Task) end() (wait []<-chan struct{}) {
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

func (t *Task) tell(p *process) {
	exit := p.Exit()
	id := p.id
	if p.exec == nil {
		t.TellOOM()
		id = t.id
	}
	t.shim.Publish(&events.TaskExit{
		ContainerID: t.id, ID: id, Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At),
	})
}

// TellOOM tells that the container ran out of memory, where it did and nobody was told.
func (t *Task) TellOOM() {
	t.telling.Lock() // what another has taken is told when this returns
	defer t.telling.Unlock()
	if t.container.TakeOOM() {
		t.shim.Publish(&events.TaskOOM{ContainerID: t.id})
	}
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
func (t *Task) deletedBefore(ctx context.Context, p *process, err error) error {
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
