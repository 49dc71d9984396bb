package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/shim/pod"
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
	t, err := s.shim.Create(ctx, sb, r, place.Role == pod.Sandbox)
	if err != nil {
		return nil, err
	}
	s.setUp()
	pidFile := filepath.Join(r.Bundle, bootstrap.InitPIDFile)
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(int(t.PID()))), 0o644); err != nil {
		slog.Warn("delete will not know the task's pid", "container", r.ID, "err", err)
	}
	s.events.Publish(&events.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: t.PID(),
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	s.mu.Lock()
	s.tasks[r.ID] = t
	s.mu.Unlock()
	t.Watch()
	return &api.CreateTaskResponse{Pid: t.PID()}, nil
}

// deleted forgets a task that was deleted.
func (s *Service) deleted(id string) {
	if s.release(id) > 0 && s.owns(id) {
		s.leaveBundle()
	}
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
	resp.TaskPid = t.PID()
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
