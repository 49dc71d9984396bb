package shim

import (
	"context"
	"maps"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	taskapi "github.com/containerd/containerd/api/types/task"

	"github.com/husk-containers/husk/shim/operator"
)

// operated is the service's sandbox as its operator has it.
type operated struct {
	sandbox
	service *Service
}

// operated returns the sandbox, or NotFound before it was created.
func (s *Service) operated() (operator.Sandbox, error) {
	l, err := s.current()
	if err != nil {
		return nil, err
	}
	return operated{l.sandbox, s}, nil
}

func (o operated) Machine() operator.Machine {
	m := o.sandbox.Machine()
	return operator.Machine{
		Paused: o.Paused(), VCPUs: m.VCPUs, MemoryMiB: m.MemoryMiB, MaxVCPUs: m.MaxVCPUs, MaxMemoryMiB: m.MaxMemoryMiB,
		CPUs: m.CPUs, MemoryNodes: m.MemoryNodes, Pinned: m.Pinned,
	}
}

// Pause and Resume tell containerd, too.
func (o operated) Pause(ctx context.Context) error  { return o.service.pauseSandbox(ctx) }
func (o operated) Resume(ctx context.Context) error { return o.service.resumeSandbox(ctx) }

func (o operated) Reclaim(ctx context.Context) (operator.Reclaimed, error) {
	before, after, err := o.sandbox.Reclaim(ctx)
	return operator.Reclaimed{BeforeMiB: before, AfterMiB: after}, err
}

var operatorStates = map[taskapi.Status]operator.State{
	taskapi.Status_CREATED: operator.Created,
	taskapi.Status_RUNNING: operator.Running,
	taskapi.Status_PAUSED:  operator.Paused,
	taskapi.Status_STOPPED: operator.Stopped,
}

// containers lists the sandbox's, as their tasks have them.
func (s *Service) containers() []operator.Container {
	s.mu.Lock()
	tasks := maps.Clone(s.tasks)
	s.mu.Unlock()
	var all []operator.Container
	for id, t := range tasks {
		if t == nil { // it is being created
			continue
		}
		// Of an init that is there State does not fail.
		if resp, err := t.State(context.Background(), &api.StateRequest{}); err == nil {
			all = append(all, operator.Container{ID: id, State: operatorStates[resp.Status]})
		}
	}
	return all
}
