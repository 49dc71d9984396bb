// Package tasktest is what tests of tasks make them of: containers that run nothing,
// and a journal of what was told.
package tasktest

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/virtcontainers"
)

// A Container is a task.Container whose processes do nothing until a test ends them.
type Container struct {
	init *Process
	// OnDelete runs within Delete; nil: nothing does.
	OnDelete func()
	oom      atomic.Bool

	mu sync.Mutex
	// Updated is what Update was called with last.
	Updated *specs.LinuxResources
	execs   map[string]*Process
}

// NewContainer returns a container that was created.
func NewContainer() *Container {
	return &Container{init: newProcess(), execs: map[string]*Process{}}
}

// Main is the fake that Init returns.
func (c *Container) Main() *Process { return c.init }

// Added is the exec of that id; nil: there is none.
func (c *Container) Added(id string) *Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.execs[id]
}

// Init is a task.Container's.
func (c *Container) Init() task.Process { return c.init }

// Exec is a task.Container's.
func (c *Container) Exec(_ context.Context, id string, _ *specs.Process, _ virtcontainers.Stdio) (task.Exec, error) {
	p := newProcess()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs[id] = p
	return p, nil
}

// Processes is a task.Container's.
func (c *Container) Processes(context.Context) ([]virtcontainers.ProcessInfo, error) {
	return []virtcontainers.ProcessInfo{{PID: 1}, {PID: 9, ExecID: "e"}}, nil
}

// Pause is a task.Container's.
func (c *Container) Pause(context.Context) error {
	return c.init.freeze(virtcontainers.Running, virtcontainers.Paused)
}

// Resume is a task.Container's.
func (c *Container) Resume(context.Context) error {
	return c.init.freeze(virtcontainers.Paused, virtcontainers.Running)
}

// Update is a task.Container's: Updated has what it was given.
func (c *Container) Update(_ context.Context, r *specs.LinuxResources) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Updated = r
	return nil
}

// Stats is a task.Container's.
func (c *Container) Stats(context.Context) (*stats.Metrics, error) {
	return &stats.Metrics{Pids: &stats.PidsStat{Current: 7}}, nil
}

// RunOutOfMemory has TakeOOM tell so once.
func (c *Container) RunOutOfMemory() { c.oom.Store(true) }

// TakeOOM is a task.Container's.
func (c *Container) TakeOOM() bool { return c.oom.Swap(false) }

// Delete is a task.Container's.
func (c *Container) Delete(context.Context) (virtcontainers.Exit, error) {
	c.init.ExitWith(137) // where it was not started
	if err := c.init.retire(); err != nil {
		return virtcontainers.Exit{}, err
	}
	if c.OnDelete != nil {
		c.OnDelete()
	}
	return c.init.Exit(), nil
}

// CopyIn takes a tar and forgets it.
func (c *Container) CopyIn(_ context.Context, _ string, tar io.Reader) error {
	_, err := io.Copy(io.Discard, tar)
	return err
}

// CopyOut writes the path, until ctx ends where the path is "forever".
func (c *Container) CopyOut(ctx context.Context, path string, tar io.Writer) error {
	_, err := io.WriteString(tar, path)
	if path == "forever" {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return err
}

// End ends the init and, in no order, the execs, as a VM's end does.
func (c *Container) End(status uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all sync.WaitGroup
	for _, p := range c.execs {
		all.Go(func() { p.ExitWith(status) })
	}
	c.init.ExitWith(status)
	all.Wait()
}

// A Process is a task.Exec.
type Process struct {
	// StartErr is what Start returns.
	StartErr error
	// OnStart runs within Start, before it returns; nil: nothing does.
	OnStart func()
	exited  chan struct{}

	mu    sync.Mutex
	state virtcontainers.ProcessState
	exit  virtcontainers.Exit
	size  [2]uint32
}

func newProcess() *Process {
	return &Process{state: virtcontainers.Created, exited: make(chan struct{})}
}

// Start is a task.Process's.
func (p *Process) Start(context.Context) error {
	if p.StartErr != nil {
		return p.StartErr
	}
	p.mu.Lock()
	if p.state != virtcontainers.Created {
		p.mu.Unlock()
		return fmt.Errorf("it has exited: %w", errdefs.ErrFailedPrecondition)
	}
	p.state = virtcontainers.Running
	p.mu.Unlock()
	if p.OnStart != nil {
		p.OnStart()
	}
	return nil
}

// ExitWith ends the process, where it has not ended.
func (p *Process) ExitWith(status uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == virtcontainers.Stopped || p.state == virtcontainers.Deleted {
		return
	}
	p.state, p.exit = virtcontainers.Stopped, virtcontainers.Exit{Status: status, At: time.Unix(1e9, 0)}
	close(p.exited)
}

func (p *Process) freeze(from, to virtcontainers.ProcessState) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != from {
		return fmt.Errorf("it is %s: %w", p.state, errdefs.ErrFailedPrecondition)
	}
	p.state = to
	return nil
}

func (p *Process) retire() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == virtcontainers.Deleted {
		return fmt.Errorf("it is deleted: %w", errdefs.ErrFailedPrecondition)
	}
	p.state = virtcontainers.Deleted
	return nil
}

// Kill is a task.Process's.
func (p *Process) Kill(context.Context, uint32, bool) error {
	if p.State() == virtcontainers.Stopped {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	return nil
}

// Resize is a task.Process's.
func (p *Process) Resize(_ context.Context, columns, rows uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.size = [2]uint32{columns, rows}
	return nil
}

// State is a task.Process's.
func (p *Process) State() virtcontainers.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// Size is what Resize was told last, in columns and rows.
func (p *Process) Size() [2]uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

// Exited is a task.Process's.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Exit is a task.Process's.
func (p *Process) Exit() virtcontainers.Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// Delete is a task.Exec's.
func (p *Process) Delete(context.Context) (virtcontainers.Exit, error) { return p.Exit(), nil }

// A Journal keeps the events that it is told, in short words.
type Journal struct {
	mu    sync.Mutex
	words []string
}

// Publish notes an event.
func (j *Journal) Publish(ev huskevents.Event) {
	var word string
	switch ev := ev.(type) {
	case *events.TaskCreate:
		word = "create " + ev.ContainerID
	case *events.TaskStart:
		word = "start " + ev.ContainerID
	case *events.TaskExecAdded:
		word = "added " + ev.ExecID
	case *events.TaskExecStarted:
		word = "start " + ev.ExecID
	case *events.TaskExit:
		word = fmt.Sprintf("exit %s %d", ev.ID, ev.ExitStatus)
	case *events.TaskDelete:
		word = "delete " + ev.ContainerID
	case *events.TaskOOM:
		word = "oom " + ev.ContainerID
	case *events.TaskPaused:
		word = "paused " + ev.ContainerID
	case *events.TaskResumed:
		word = "resumed " + ev.ContainerID
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.words = append(j.words, word)
}

// Close does nothing.
func (j *Journal) Close(context.Context) error { return nil }

// Words returns what was told, in order.
func (j *Journal) Words() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]string(nil), j.words...)
}
