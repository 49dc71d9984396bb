// Package task is a container as containerd sees it: the calls of the task API for
// one, and what is told of its processes in which order.
package task

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/shim/stdio"
	"github.com/husk-containers/husk/shim/transfer"
	"github.com/husk-containers/husk/virtcontainers"
)

// What a task needs of a sandbox. Its real ones are virtcontainers'.
type (
	// A Sandbox has the containers.
	Sandbox interface {
		PID() int
		CreateContainer(ctx context.Context, c virtcontainers.ContainerConfig) (Container, error)
	}
	// A Container is what a task is of.
	Container interface {
		transfer.Files
		Init() Process
		Exec(ctx context.Context, id string, spec *specs.Process, io virtcontainers.Stdio) (Exec, error)
		Processes(ctx context.Context) ([]virtcontainers.ProcessInfo, error)
		Pause(ctx context.Context) error
		Resume(ctx context.Context) error
		Update(ctx context.Context, r *specs.LinuxResources) error
		Stats(ctx context.Context) (*stats.Metrics, error)
		// TakeOOM tells, once, that one of its processes was killed for want of memory.
		TakeOOM() bool
		Delete(ctx context.Context) (virtcontainers.Exit, error)
	}
	// A Process is a container's init or an exec.
	Process interface {
		Start(ctx context.Context) error
		Kill(ctx context.Context, signal uint32, all bool) error
		Resize(ctx context.Context, columns, rows uint32) error
		State() virtcontainers.ProcessState
		Exited() <-chan struct{}
		Exit() virtcontainers.Exit
	}
	// An Exec is a process that goes before its container does.
	Exec interface {
		Process
		Delete(ctx context.Context) (virtcontainers.Exit, error)
	}
)

// A Shim is what the tasks of one have in common.
type Shim struct {
	// Namespace is containerd's.
	Namespace string
	Publish   func(huskevents.Event)
	// Watch runs f in a goroutine that ends soon after Done was closed, and reports
	// whether it does: once the sandbox has been stopped there is nothing to watch.
	Watch func(f func()) bool
	// Done is closed when the sandbox has been stopped.
	Done <-chan struct{}
	// Deleted is called when the task of that id was deleted and that was told, before
	// its Delete is answered.
	Deleted func(id string)
	// Wake has a sandbox that is paused go on, and tells of it.
	Wake func(ctx context.Context) error
}

// A Task is a container as containerd sees it. Its methods are safe for concurrent
// use.
//
// What is told of a process comes in this order, whatever the races: its start
// before its exit, and the exits of execs, and that memory ran out, before that of the
// task. So the exit of
// a process is held back until it was told of its start, and to clients the
// process runs until its exit was told.
type Task struct {
	shim       *Shim
	id, bundle string
	holds      bool // nothing runs in it
	container  Container
	init       *process
	// deleted is closed when a Delete has ended.
	deleted chan struct{}

	telling sync.Mutex // of memory that ran out

	mu sync.Mutex
	// execs by id; nil while one is being added.
	execs map[string]*process
	// ended is set when the init has exited: no exec is started any more.
	ended bool
}

// A process is a task's init or one of its execs.
type process struct {
	Process
	exec    Exec   // nil for an init
	id      string // the exec id, empty for an init
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

// Create makes the container that r asks for, and the task of it. With holds it is the
// sandbox container of a pod, in which nothing runs.
func (s *Shim) Create(ctx context.Context, sb Sandbox, r *api.CreateTaskRequest, holds bool) (*Task, error) {
	uris := stdio.URIs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	streams, err := stdio.Open(ctx, uris, stdio.Owner{ID: r.ID, Namespace: s.Namespace})
	if err != nil {
		return nil, fmt.Errorf("create task %q: %w", r.ID, err)
	}
	var rootfs []mount.Mount
	for _, m := range r.Rootfs {
		rootfs = append(rootfs, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	c, err := sb.CreateContainer(ctx, virtcontainers.ContainerConfig{
		ID: r.ID, Bundle: r.Bundle, Rootfs: rootfs, Stdio: processStdio(uris, streams), Holds: holds,
	})
	if err != nil {
		return nil, err
	}
	return &Task{
		shim: s, id: r.ID, bundle: r.Bundle, holds: holds, container: c,
		init:    &process{Process: c.Init(), pid: uint32(sb.PID()), uris: uris, streams: streams, told: make(chan struct{})},
		deleted: make(chan struct{}), execs: map[string]*process{},
	}, nil
}

func processStdio(u stdio.URIs, s *stdio.Streams) virtcontainers.Stdio {
	return virtcontainers.Stdio{Terminal: u.Terminal, Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr}
}

// PID is that of the task's processes to containerd: the VM monitor's.
func (t *Task) PID() uint32 { return t.init.pid }

// Holds tells whether it is the sandbox container of a pod, in which nothing runs.
func (t *Task) Holds() bool { return t.holds }

// Files are the container's.
func (t *Task) Files() transfer.Files { return t.container }

// Watch begins to wait for the task's exit, to tell of it. It is called once, when
// the task's creation was told.
func (t *Task) Watch() {
	if !t.shim.Watch(t.watchInit) {
		close(t.init.told)
	}
}

// process returns the init, or with an exec id that exec, or NotFound.
func (t *Task) process(execID string) (*process, error) {
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
func (t *Task) reserve(execID string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.execs[execID]; ok {
		return fmt.Errorf("exec %q of task %q: %w", execID, t.id, errdefs.ErrAlreadyExists)
	}
	t.execs[execID] = nil
	return nil
}

// set puts an exec in the place of its reservation; nil gives that back.
func (t *Task) set(execID string, p *process) {
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

func (t *Task) name(p *process) string {
	if p.exec == nil {
		return fmt.Sprintf("task %q", t.id)
	}
	return fmt.Sprintf("exec %q of task %q", p.id, t.id)
}
