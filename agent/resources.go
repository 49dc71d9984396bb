package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/lifecycle"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	// pauseTimeout bounds the wait for processes to stand, and for those that are being
	// started in the container, where the host's own patience does not.
	pauseTimeout = 30 * time.Second
	// onlineTimeout bounds the wait for CPUs and memory in the same way.
	onlineTimeout = 30 * time.Second
)

// UpdateContainer implements agentv1.AgentService.
func (a service) UpdateContainer(ctx context.Context, r *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	id := r.GetContainerId()
	resources, err := container.DecodeResources(r.GetResources())
	if err != nil {
		return nil, fmt.Errorf("update container %q: %w", id, err)
	}
	p, err := a.lookup(id, "")
	if err != nil {
		return nil, err
	}
	p.container.updating.Lock() // updates are in turn, each the whole of it; reads do not wait
	defer p.container.updating.Unlock()
	if err := a.opts.Runtime.Update(ctx, id, resources); err != nil {
		return nil, err
	}
	return &agentv1.UpdateContainerResponse{}, nil
}

// PauseContainer implements agentv1.AgentService. A process that is being started in the
// container would stand half-way, and its ExecProcess with it: it is waited for.
func (a service) PauseContainer(ctx context.Context, r *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, pauseTimeout)
	defer cancel()
	p, err := a.begin(r.GetContainerId(), "", lifecycle.Pause)
	if err != nil {
		return nil, err
	}
	err = p.container.launches.wait(ctx)
	if err == nil {
		err = a.opts.Runtime.Pause(ctx, r.GetContainerId())
	}
	if err := a.finish(p, err, lifecycle.Frozen, lifecycle.Thawed); err != nil {
		return nil, err
	}
	return &agentv1.PauseContainerResponse{}, nil
}

// ResumeContainer implements agentv1.AgentService.
func (a service) ResumeContainer(ctx context.Context, r *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, pauseTimeout)
	defer cancel()
	p, err := a.begin(r.GetContainerId(), "", lifecycle.Resume)
	if err != nil {
		return nil, err
	}
	err = a.opts.Runtime.Resume(ctx, r.GetContainerId())
	if err := a.finish(p, err, lifecycle.Thawed, lifecycle.Frozen); err != nil {
		return nil, err
	}
	return &agentv1.ResumeContainerResponse{}, nil
}

// finish moves p on as what was begun came out.
func (a *Agent) finish(p *process, err error, good, bad lifecycle.Event) error {
	e := good
	if err != nil {
		e = bad
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return errors.Join(err, p.move(e))
}

// launches counts the execs that are being started in a container. The zero value is
// ready.
type launches struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n is 0; nil: nobody waits
}

func (l *launches) add(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n += n; l.n == 0 && l.none != nil {
		close(l.none)
		l.none = nil
	}
}

func (l *launches) wait(ctx context.Context) error {
	l.mu.Lock()
	if l.n == 0 {
		l.mu.Unlock()
		return nil
	}
	if l.none == nil {
		l.none = make(chan struct{})
	}
	none := l.none
	l.mu.Unlock()
	select {
	case <-none:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for processes that are being started: %w", context.Cause(ctx))
	}
}

// StatsContainer implements agentv1.AgentService. It holds no lock while it reads, so
// that no container waits for another.
func (a service) StatsContainer(ctx context.Context, r *agentv1.StatsContainerRequest) (*agentv1.StatsContainerResponse, error) {
	if id := r.GetContainerId(); id != "" {
		if _, err := a.lookup(id, ""); err != nil {
			return nil, err
		}
	}
	answer, err := a.opts.Runtime.Stats(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if answer.Interfaces, err = a.opts.Platform.Interfaces(); err != nil {
		return nil, err
	}
	return answer, nil
}

// OnlineResources implements agentv1.AgentService.
func (a service) OnlineResources(ctx context.Context, r *agentv1.OnlineResourcesRequest) (*agentv1.OnlineResourcesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, onlineTimeout)
	defer cancel()
	return a.opts.Platform.Online(ctx, int(r.GetCpus()), r.GetMemoryBytes())
}
