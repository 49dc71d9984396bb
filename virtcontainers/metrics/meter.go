package metrics

import (
	"context"
	"errors"
	"sync"

	"github.com/containerd/cgroups/v3/cgroup2/stats"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/guest"
)

// A Meter reads what a container uses. While the guest is paused nothing changes, and it
// tells what it read last. Its methods are safe for concurrent use.
type Meter struct {
	guest *guest.Guest
	id    string // empty: all containers

	mu        sync.Mutex
	stats     *stats.Metrics
	processes []*agentv1.ProcessInfo
}

// NewMeter returns that of the container of that id; empty: of all together.
func NewMeter(g *guest.Guest, id string) *Meter { return &Meter{guest: g, id: id} }

// Read reads what is told while the guest is paused.
func (m *Meter) Read(ctx context.Context) error {
	_, err := m.Stats(ctx)
	if m.id != "" {
		_, perr := m.Processes(ctx)
		err = errors.Join(err, perr)
	}
	return err
}

// Stats are the container's.
func (m *Meter) Stats(ctx context.Context) (*stats.Metrics, error) {
	var resp *agentv1.StatsContainerResponse
	err := m.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.StatsContainer(ctx, &agentv1.StatsContainerRequest{ContainerId: m.id})
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil:
		m.stats = Of(resp)
	case !errors.Is(err, guest.ErrPaused) || m.stats == nil:
		return nil, err
	}
	return m.stats, nil
}

// Processes are the container's.
func (m *Meter) Processes(ctx context.Context) ([]*agentv1.ProcessInfo, error) {
	var resp *agentv1.ListProcessesResponse
	err := m.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.ListProcesses(ctx, &agentv1.ListProcessesRequest{ContainerId: m.id})
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil:
		m.processes = resp.Processes
	case !errors.Is(err, guest.ErrPaused) || m.processes == nil:
		return nil, err
	}
	return m.processes, nil
}
