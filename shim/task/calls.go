package task

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/husk-containers/husk/shim/stdio"
	"github.com/husk-containers/husk/virtcontainers"
)

// Start starts a process, and tells of it.
func (t *Task) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := t.start(ctx, p); err != nil {
		return nil, err
	}
	return &api.StartResponse{Pid: p.pid}, nil
}

// Delete takes back an exec, or the task: it then waits until its exit was told.
func (t *Task) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	if s := p.state(); (s == virtcontainers.Running || s == virtcontainers.Paused) && p.State() != virtcontainers.Deleted {
		return nil, fmt.Errorf("delete %s: it is %s: %w", t.name(p), s, errdefs.ErrFailedPrecondition)
	}
	client := ctx
	// The client may go away; what was begun is finished.
	ctx = context.WithoutCancel(ctx)
	if p.exec == nil && p.state() == virtcontainers.Created {
		if err := t.shim.Wake(ctx); err != nil {
			return nil, err
		}
	}
	if p.exec != nil {
		if _, err := p.exec.Delete(ctx); err != nil {
			return nil, t.deletedBefore(client, p, err)
		}
		t.set(p.id, nil)
		p.abandon(false)
	} else {
		if _, err := t.container.Delete(ctx); err != nil {
			return nil, t.deletedBefore(client, p, err)
		}
		defer close(t.deleted)
		if err := p.awaitTold(ctx); err != nil {
			return nil, err
		}
		exit := p.exit()
		t.shim.Publish(&events.TaskDelete{
			ContainerID: t.id, Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At),
		})
		t.shim.Deleted(t.id)
	}
	exit := p.exit()
	return &api.DeleteResponse{Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

// Exec adds a process, which then can be started.
func (t *Task) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	spec := &specs.Process{}
	if err := json.Unmarshal(r.Spec.GetValue(), spec); err != nil {
		return nil, fmt.Errorf("exec %q in task %q: decode the process: %w: %w", r.ExecID, t.id, err, errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.Terminal
	if err := t.reserve(r.ExecID); err != nil {
		return nil, err
	}
	p, err := t.addExec(ctx, r, spec)
	t.set(r.ExecID, p)
	if err != nil {
		return nil, err
	}
	t.shim.Publish(&events.TaskExecAdded{ContainerID: t.id, ExecID: p.id})
	return &emptypb.Empty{}, nil
}

func (t *Task) addExec(ctx context.Context, r *api.ExecProcessRequest, spec *specs.Process) (*process, error) {
	uris := stdio.URIs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	streams, err := stdio.Open(ctx, uris, stdio.Owner{ID: r.ExecID, Namespace: t.shim.Namespace})
	if err != nil {
		return nil, fmt.Errorf("exec %q in task %q: %w", r.ExecID, t.id, err)
	}
	x, err := t.container.Exec(ctx, r.ExecID, spec, processStdio(uris, streams))
	if err != nil {
		return nil, err
	}
	return &process{
		Process: x, exec: x, id: r.ExecID, pid: t.init.pid, uris: uris, streams: streams, told: make(chan struct{}),
	}, nil
}

// ResizePty sets the size of a process's terminal.
func (t *Task) ResizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.Resize(ctx, r.Width, r.Height)
}

var statuses = map[virtcontainers.ProcessState]taskapi.Status{
	virtcontainers.Created: taskapi.Status_CREATED,
	virtcontainers.Running: taskapi.Status_RUNNING,
	virtcontainers.Paused:  taskapi.Status_PAUSED,
	virtcontainers.Stopped: taskapi.Status_STOPPED,
}

// State tells how a process is.
func (t *Task) State(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	resp := &api.StateResponse{
		ID: t.id, Bundle: t.bundle, Pid: p.pid, Status: statuses[p.state()], ExecID: p.id,
		Stdin: p.uris.Stdin, Stdout: p.uris.Stdout, Stderr: p.uris.Stderr, Terminal: p.uris.Terminal,
	}
	if p.exec != nil {
		resp.ID = p.id // an exec's own, as clients have it from runc's shim
	}
	var exit virtcontainers.Exit
	if resp.Status == taskapi.Status_STOPPED {
		exit = p.exit()
	}
	resp.ExitStatus, resp.ExitedAt = exit.Status, timestamppb.New(exit.At)
	return resp, nil
}

// Kill signals a process, or all. What is to end for certain wakes a sandbox that is
// paused: a pod that is deleted must not hang.
func (t *Task) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	p, err := t.process(r.ExecID)
	if err == nil && unix.Signal(r.Signal) == unix.SIGKILL {
		err = t.shim.Wake(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.Kill(ctx, r.Signal, r.All)
}

// Pids lists the task's processes.
func (t *Task) Pids(ctx context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	if t.holds {
		return t.sandboxPids(), nil
	}
	processes, err := t.container.Processes(ctx)
	if err != nil {
		return nil, err
	}
	resp := &api.PidsResponse{}
	for _, p := range processes {
		entry := &taskapi.ProcessInfo{Pid: p.PID}
		if p.ExecID != "" {
			details := &options.ProcessDetails{ExecID: p.ExecID}
			raw, err := proto.Marshal(details)
			if err != nil {
				return nil, fmt.Errorf("list processes of task %q: %w", t.id, err)
			}
			entry.Info = &anypb.Any{TypeUrl: string(details.ProtoReflect().Descriptor().FullName()), Value: raw}
		}
		resp.Processes = append(resp.Processes, entry)
	}
	return resp, nil
}

// CloseIO ends a process's standard input.
func (t *Task) CloseIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.streams.CloseStdin()
	}
	return &emptypb.Empty{}, nil
}

// Wait waits until a process's exit was told.
func (t *Task) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	p, err := t.process(r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := p.awaitTold(ctx); err != nil {
		return nil, err
	}
	exit := p.exit()
	return &api.WaitResponse{ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

// sandboxPids lists the one process of a container that runs nothing: the VM's
// monitor, until the task has exited. containerd takes a task without processes for
// one that was left behind, and removes it when it starts.
func (t *Task) sandboxPids() *api.PidsResponse {
	resp := &api.PidsResponse{}
	if t.init.state() != virtcontainers.Stopped {
		resp.Processes = []*taskapi.ProcessInfo{{Pid: t.init.pid}}
	}
	return resp
}
