package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/shim/stdio"
	"github.com/husk-containers/husk/virtcontainers"
)

func (s *Service) create(ctx context.Context, r *api.CreateTaskRequest) (_ *api.CreateTaskResponse, err error) {
	defer func() {
		if errdefs.IsNotImplemented(err) {
			err = refusal{err}
		}
	}()
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("create task %q from checkpoint %q: %w", r.ID, r.Checkpoint, errdefs.ErrNotImplemented)
	}
	sb, err := s.startedSandbox()
	if err != nil {
		return nil, fmt.Errorf("create task %q: %w", r.ID, err)
	}
	place, err := pod.ReadPlace(r.Bundle, r.ID)
	if err != nil {
		return nil, fmt.Errorf("create task %q: %w", r.ID, err)
	}
	if err := s.reserve(r.ID); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		s.release(r.ID)
		if s.owns(r.ID) {
			s.abandonSandbox(ctx, r.ID)
		}
	}()
	uris := stdio.URIs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	streams, err := stdio.Open(ctx, uris, stdio.Owner{ID: r.ID, Namespace: s.namespace})
	if err != nil {
		return nil, fmt.Errorf("create task %q: %w", r.ID, err)
	}
	var rootfs []mount.Mount
	for _, m := range r.Rootfs {
		rootfs = append(rootfs, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	c, err := sb.CreateContainer(ctx, virtcontainers.ContainerConfig{
		ID: r.ID, Bundle: r.Bundle, Rootfs: rootfs, Stdio: processStdio(uris, streams),
		Holds: place.Role == pod.Sandbox,
	})
	if err != nil {
		return nil, err
	}
	s.setUp()
	t := &task{id: r.ID, bundle: r.Bundle, place: place, container: c, deleted: make(chan struct{}), execs: map[string]*process{}}
	t.init = &process{initProcess: c.Init(), pid: uint32(sb.PID()), uris: uris, streams: streams, told: make(chan struct{})}
	pidFile := filepath.Join(r.Bundle, bootstrap.InitPIDFile)
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(int(t.init.pid))), 0o644); err != nil {
		slog.Warn("delete will not know the task's pid", "container", r.ID, "err", err)
	}
	s.events.Publish(&events.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: t.init.pid,
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	s.mu.Lock()
	s.tasks[r.ID] = t
	s.mu.Unlock()
	if !s.watch(func() { s.watchInit(t) }) {
		close(t.init.told)
	}
	return &api.CreateTaskResponse{Pid: t.init.pid}, nil
}

func processStdio(u stdio.URIs, s *stdio.Streams) virtcontainers.Stdio {
	return virtcontainers.Stdio{Terminal: u.Terminal, Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr}
}

func (s *Service) startProcess(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	t, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := s.start(ctx, t, p); err != nil {
		return nil, err
	}
	return &api.StartResponse{Pid: p.pid}, nil
}

func (s *Service) delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	t, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p.state() == virtcontainers.Running && p.State() != virtcontainers.Deleted {
		return nil, fmt.Errorf("delete %s: it is running: %w", t.name(p), errdefs.ErrFailedPrecondition)
	}
	client := ctx
	// The client may go away; what was begun is finished.
	ctx = context.WithoutCancel(ctx)
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
		s.events.Publish(&events.TaskDelete{
			ContainerID: t.id, Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At),
		})
		if s.release(t.id) > 0 && s.owns(t.id) {
			s.leaveBundle()
		}
	}
	exit := p.exit()
	return &api.DeleteResponse{Pid: p.pid, ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

// leaveBundle has shim and sandbox outlive their bundle: containerd takes the end of
// a shim's first task for that of the shim, and runs delete in the bundle, while
// other containers of the pod are still to be heard of.
func (s *Service) leaveBundle() {
	l, err := s.current()
	if err == nil {
		err = errors.Join(s.leave(), l.sandbox.Leave())
	}
	if err != nil {
		slog.Error("the pod's other containers end with its sandbox container", "err", err)
	}
}

func (s *Service) exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.ID)
	if err != nil {
		return nil, err
	}
	spec := &specs.Process{}
	if err := json.Unmarshal(r.Spec.GetValue(), spec); err != nil {
		return nil, fmt.Errorf("exec %q in task %q: decode the process: %w: %w", r.ExecID, t.id, err, errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.Terminal
	if err := t.reserve(r.ExecID); err != nil {
		return nil, err
	}
	p, err := s.addExec(ctx, t, r, spec)
	t.set(r.ExecID, p)
	if err != nil {
		return nil, err
	}
	s.events.Publish(&events.TaskExecAdded{ContainerID: t.id, ExecID: p.id})
	return &emptypb.Empty{}, nil
}

func (s *Service) addExec(ctx context.Context, t *task, r *api.ExecProcessRequest, spec *specs.Process) (*process, error) {
	uris := stdio.URIs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	streams, err := stdio.Open(ctx, uris, stdio.Owner{ID: r.ExecID, Namespace: s.namespace})
	if err != nil {
		return nil, fmt.Errorf("exec %q in task %q: %w", r.ExecID, t.id, err)
	}
	x, err := t.container.Exec(ctx, r.ExecID, spec, processStdio(uris, streams))
	if err != nil {
		return nil, err
	}
	return &process{
		initProcess: x, exec: x, id: r.ExecID, pid: t.init.pid, uris: uris, streams: streams, told: make(chan struct{}),
	}, nil
}

func (s *Service) resizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.Resize(ctx, r.Width, r.Height)
}

var statuses = map[virtcontainers.ProcessState]taskapi.Status{
	virtcontainers.Created: taskapi.Status_CREATED,
	virtcontainers.Running: taskapi.Status_RUNNING,
	virtcontainers.Stopped: taskapi.Status_STOPPED,
}

func (s *Service) state(_ context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	t, p, err := s.process(r.ID, r.ExecID)
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

func (s *Service) kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.Kill(ctx, r.Signal, r.All)
}

func (s *Service) pids(ctx context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	t, err := s.task(r.ID)
	if err != nil {
		return nil, err
	}
	if t.place.Role == pod.Sandbox {
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

func (s *Service) closeIO(_ context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.streams.CloseStdin()
	}
	return &emptypb.Empty{}, nil
}

func (s *Service) wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := p.awaitTold(ctx); err != nil {
		return nil, err
	}
	exit := p.exit()
	return &api.WaitResponse{ExitStatus: exit.Status, ExitedAt: timestamppb.New(exit.At)}, nil
}

// connect is how a containerd that was started again finds out whether the shim
// still has what it was started for. Where it does not, since containerd ended
// before Create, containerd has to hear of it: it then runs delete, and otherwise
// might keep for ever a VM that nobody uses.
func (s *Service) connect(_ context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	resp := &api.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if s.hold && r.ID == s.id {
		_, err := s.current()
		return resp, err
	}
	t, err := s.task(r.ID)
	if err != nil {
		return nil, err
	}
	resp.TaskPid = t.init.pid
	return resp, nil
}

// shutdownIdle ends the shim where nothing is left: no task, and no pod by the
// sandbox API. containerd calls it after every deletion of a task.
func (s *Service) shutdownIdle(ctx context.Context, _ *api.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	left := len(s.tasks) > 0 || s.hold && s.pod.phase != absent
	s.mu.Unlock()
	if !left {
		s.end(ctx)
	}
	return &emptypb.Empty{}, nil
}

// end stops everything; the shim ends once the call of ctx has been answered.
func (s *Service) end(ctx context.Context) {
	if err := s.stop(); err != nil {
		// The end comes nonetheless, and containerd's delete after it.
		slog.Error("shut down", "err", err)
	}
	// The call's context ends once its reply is on the way.
	context.AfterFunc(ctx, func() { s.askedOnce.Do(func() { close(s.shutdown) }) })
}
