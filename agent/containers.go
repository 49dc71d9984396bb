package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/lifecycle"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// CreateContainer implements agentv1.AgentService.
func (a service) CreateContainer(ctx context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	id := r.GetContainerId()
	spec, err := container.DecodeSpec(id, r.GetSpec(), r.GetStreams().GetTerminal())
	if err != nil {
		return nil, fmt.Errorf("create container %q: %w", id, err)
	}
	c := &guestContainer{id: id, ownPID: container.HasOwnPID(spec), execs: make(map[string]*process)}
	c.init = &process{container: c, state: lifecycle.Creating}
	a.mu.Lock()
	taken := a.containers[id] != nil
	if !taken {
		a.containers[id] = c
	}
	a.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("create container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	err = a.launch(c.init, r.GetStreams(), func(stdio container.Stdio) (*container.Process, error) {
		if err := a.makeDevices(spec); err != nil {
			return nil, fmt.Errorf("create container %q: %w", id, err)
		}
		return a.opts.Runtime.Create(ctx, id, spec, r.GetFileSystems(), stdio)
	}, lifecycle.Made)
	if err != nil {
		a.mu.Lock()
		delete(a.containers, id)
		a.mu.Unlock()
		return nil, err
	}
	return &agentv1.CreateContainerResponse{Pid: uint32(c.init.PID())}, nil
}

// StartContainer implements agentv1.AgentService.
func (a service) StartContainer(ctx context.Context, r *agentv1.StartContainerRequest) (*agentv1.StartContainerResponse, error) {
	p, err := a.begin(r.GetContainerId(), "", lifecycle.Start)
	if err != nil {
		return nil, err
	}
	err = a.opts.Runtime.Start(ctx, r.GetContainerId())
	outcome := lifecycle.Started
	if err != nil {
		outcome = lifecycle.Failed
	}
	a.mu.Lock()
	merr := p.move(outcome)
	a.mu.Unlock()
	if err := errors.Join(err, merr); err != nil {
		return nil, err
	}
	return &agentv1.StartContainerResponse{}, nil
}

// begin finds a process and moves it on.
func (a *Agent) begin(containerID, execID string, e lifecycle.Event) (*process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.find(containerID, execID)
	if err != nil {
		return nil, err
	}
	return p, p.move(e)
}

// ExecProcess implements agentv1.AgentService.
func (a service) ExecProcess(ctx context.Context, r *agentv1.ExecProcessRequest) (*agentv1.ExecProcessResponse, error) {
	id, execID := r.GetContainerId(), r.GetExecId()
	process, err := container.DecodeProcess(r.GetProcess(), r.GetStreams().GetTerminal())
	if err != nil {
		return nil, fmt.Errorf("exec %q in container %q: %w", execID, id, err)
	}
	p, err := a.addExec(id, execID)
	if err != nil {
		return nil, err
	}
	defer p.container.launches.add(-1)
	err = a.launch(p, r.GetStreams(), func(stdio container.Stdio) (*container.Process, error) {
		return a.opts.Runtime.Exec(ctx, id, execID, process, stdio)
	}, lifecycle.Made, lifecycle.Start, lifecycle.Started)
	if err != nil {
		a.mu.Lock()
		delete(p.container.execs, execID)
		a.mu.Unlock()
		return nil, err
	}
	return &agentv1.ExecProcessResponse{Pid: uint32(p.PID())}, nil
}

// addExec adds an exec, still to be made, to a running container. It is counted in
// launches.
func (a *Agent) addExec(id, execID string) (*process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	init, err := a.find(id, "")
	if err != nil {
		return nil, err
	}
	p := &process{container: init.container, execID: execID, state: lifecycle.Creating}
	if init.state != lifecycle.Running {
		return nil, fmt.Errorf("%s: the container is %s: %w", p, init.state, errdefs.ErrFailedPrecondition)
	}
	if p.container.execs[execID] != nil {
		return nil, fmt.Errorf("%s: %w", p, errdefs.ErrAlreadyExists)
	}
	p.container.execs[execID] = p
	p.container.launches.add(1)
	return p, nil
}

// SignalProcess implements agentv1.AgentService.
func (a service) SignalProcess(ctx context.Context, r *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	p, err := a.lookup(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	signal := syscall.Signal(r.GetSignal())
	if r.GetAll() {
		err = a.opts.Runtime.Kill(ctx, r.GetContainerId(), signal)
	} else if err = p.Signal(signal); errors.Is(err, os.ErrProcessDone) {
		err = fmt.Errorf("signal %s: the process has ended: %w", p, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return &agentv1.SignalProcessResponse{}, nil
}

// WaitProcess implements agentv1.AgentService.
func (a service) WaitProcess(ctx context.Context, r *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	p, err := a.lookup(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	return p.wait(ctx)
}

// ResizeTTY implements agentv1.AgentService.
func (a service) ResizeTTY(_ context.Context, r *agentv1.ResizeTTYRequest) (*agentv1.ResizeTTYResponse, error) {
	p, err := a.lookup(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if p.Console == nil {
		return nil, fmt.Errorf("resize: %s has no terminal: %w", p, errdefs.ErrFailedPrecondition)
	}
	err = container.Resize(p.Console, uint16(r.GetColumns()), uint16(r.GetRows()))
	if errors.Is(err, os.ErrClosed) {
		err = fmt.Errorf("resize: %s has ended: %w", p, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return &agentv1.ResizeTTYResponse{}, nil
}

// RemoveContainer implements agentv1.AgentService.
func (a service) RemoveContainer(ctx context.Context, r *agentv1.RemoveContainerRequest) (*agentv1.RemoveContainerResponse, error) {
	id, execID := r.GetContainerId(), r.GetExecId()
	p, err := a.begin(id, execID, lifecycle.Remove)
	if err != nil {
		return nil, err
	}
	if execID != "" {
		err = a.removeExec(ctx, p)
	} else {
		err = a.removeContainer(ctx, p.container)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err != nil:
		return nil, errors.Join(err, p.move(lifecycle.Kept))
	case execID != "":
		delete(p.container.execs, execID)
	default:
		delete(a.containers, id)
	}
	return &agentv1.RemoveContainerResponse{}, nil
}

func (a *Agent) removeExec(ctx context.Context, p *process) error {
	if err := p.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return p.discard(ctx)
}

func (a *Agent) removeContainer(ctx context.Context, c *guestContainer) error {
	if err := a.opts.Runtime.Delete(ctx, c.id); err != nil {
		return err
	}
	a.mu.Lock()
	all := c.made()
	a.mu.Unlock()
	for _, p := range all {
		if err := p.discard(ctx); err != nil {
			return err
		}
	}
	return nil
}

// discard waits for the end of p, which has been killed, and ends its streams.
func (p *process) discard(ctx context.Context) error {
	select {
	case <-p.Done():
	case <-ctx.Done():
		return fmt.Errorf("remove %s: %w", p, context.Cause(ctx))
	}
	p.streams.Close()
	<-p.done // at once: there is nothing to drain into
	return nil
}

// InitPID implements files.Containers. A process that it tells of has not been
// reaped: its pid is no other's yet.
func (a *Agent) InitPID(id string) (int, error) {
	a.mu.Lock()
	p, err := a.find(id, "")
	if err == nil && p.state != lifecycle.Running {
		err = fmt.Errorf("the container is %s: %w", p.state, errdefs.ErrFailedPrecondition)
	}
	a.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if p.Signal(0) != nil {
		return 0, fmt.Errorf("the container has ended: %w", errdefs.ErrFailedPrecondition)
	}
	return p.PID(), nil
}

// ListProcesses implements agentv1.AgentService.
func (a service) ListProcesses(ctx context.Context, r *agentv1.ListProcessesRequest) (*agentv1.ListProcessesResponse, error) {
	p, err := a.lookup(r.GetContainerId(), "")
	if err != nil {
		return nil, err
	}
	pids, err := a.opts.Runtime.Pids(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	execs := make(map[int]string)
	a.mu.Lock()
	for execID, e := range p.container.execs {
		if e.state == lifecycle.Running {
			execs[e.PID()] = execID
		}
	}
	a.mu.Unlock()
	answer := &agentv1.ListProcessesResponse{}
	for _, pid := range pids {
		answer.Processes = append(answer.Processes, &agentv1.ProcessInfo{Pid: uint32(pid), ExecId: execs[pid]})
	}
	return answer, nil
}
