package shim

import (
	"context"
	"fmt"
	"strings"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/shim/operator"
	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/shim/transfer"
)

// register puts the methods on a server: the task API's under the names of both of
// its versions. Their messages are the same on the wire (a test holds that), so one set of
// types serves both.
func (s *Service) register(server *ttrpc.Server) {
	methods := map[string]ttrpc.Method{
		"Create":    method(s.create),
		"Start":     onTask(s, (*task.Task).Start),
		"Delete":    onTask(s, (*task.Task).Delete),
		"Exec":      onTask(s, (*task.Task).Exec),
		"ResizePty": onTask(s, (*task.Task).ResizePty),
		"State":     onTask(s, (*task.Task).State),
		"Kill":      onTask(s, (*task.Task).Kill),
		"Pids":      onTask(s, (*task.Task).Pids),
		"CloseIO":   onTask(s, (*task.Task).CloseIO),
		"Wait":      onTask(s, (*task.Task).Wait),
		"Connect":   method(s.connect),
		"Shutdown":  method(s.shutdownIdle),

		"Pause":  onTask(s, (*task.Task).Pause),
		"Resume": onTask(s, (*task.Task).Resume),
		"Stats":  onTask(s, (*task.Task).Stats),
		"Update": onTask(s, (*task.Task).Update),

		"Checkpoint": unsupported[api.CheckpointTaskRequest]("a checkpoint of a task"),
	}
	for _, name := range []string{"containerd.task.v2.Task", "containerd.task.v3.Task"} {
		server.Register(name, methods)
	}
	server.Register("containerd.runtime.sandbox.v1.Sandbox", map[string]ttrpc.Method{
		"CreateSandbox":   method(s.createSandbox),
		"StartSandbox":    method(s.startSandbox),
		"Platform":        method(s.platform),
		"PingSandbox":     method(s.pingSandbox),
		"SandboxStatus":   method(s.sandboxStatus),
		"WaitSandbox":     method(s.waitSandbox),
		"StopSandbox":     method(s.stopSandboxNow),
		"ShutdownSandbox": method(s.shutdownSandbox),
		"SandboxMetrics":  method(s.sandboxMetrics),

		// containerd takes this answer for what it is, and goes on.
		"UpdateSandbox": unsupported[sandboxapi.UpdateSandboxRequest]("updating a sandbox, whose VM changes with its containers,"),
	})
	s.transfers.Register(server)
	operator.New(s.operated, s.containers).Register(server)
}

// files returns the files of the task of that id.
func (s *Service) files(id string) (transfer.Files, error) {
	t, err := s.task(id)
	if err != nil {
		return nil, err
	}
	return t.Files(), nil
}

// method makes a ttrpc method of a function. This is the edge where an error's
// class becomes a status.
func method[Request, Response any](f func(context.Context, *Request) (*Response, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Request)
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		resp, err := f(ctx, req)
		if err != nil {
			return nil, errgrpc.ToGRPC(oneLine{err})
		}
		return resp, nil
	}
}

// onTask makes a ttrpc method of a call that concerns one task.
func onTask[R interface {
	*Request
	GetID() string
}, Request, Response any](s *Service, f func(*task.Task, context.Context, R) (*Response, error)) ttrpc.Method {
	return method(func(ctx context.Context, r *Request) (*Response, error) {
		t, err := s.task(R(r).GetID())
		if err != nil {
			return nil, err
		}
		return f(t, ctx, r)
	})
}

// unsupported makes a method that says so.
func unsupported[Request any](what string) ttrpc.Method {
	return method(func(context.Context, *Request) (*struct{}, error) {
		return nil, fmt.Errorf("%s is not supported by this runtime: %w", what, errdefs.ErrNotImplemented)
	})
}

// oneLine is an error whose text fits a client's line.
type oneLine struct{ error }

func (e oneLine) Error() string {
	return strings.ReplaceAll(strings.TrimSpace(e.error.Error()), "\n", "; ")
}

func (e oneLine) Unwrap() error { return e.error }

// A refusal is an error of Create that containerd is not to know as NotImplemented:
// it would take it for a shim of an older API and call again, when the task's streams
// have been closed and nobody reads them any more.
type refusal struct{ error }

func (e refusal) Unwrap() error { return errdefs.ErrFailedPrecondition }
