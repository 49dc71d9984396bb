package virtcontainers

import (
	"context"
	"fmt"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/virtcontainers/metrics"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// Stats tells what the container uses in the guest; a pod's sandbox container, what
// all containers of the pod do, and the pod's network.
func (c *Container) Stats(ctx context.Context) (*stats.Metrics, error) {
	m, err := c.meter.Stats(ctx)
	return m, refusal.During(err, "statistics of container %q", c.id)
}

// Usage tells what the sandbox costs the host, of which what its containers use is a
// part: by the pod's cgroup.
func (s *Sandbox) Usage() (*stats.Metrics, error) {
	if s.cgroup == nil {
		return nil, fmt.Errorf("the pod has no cgroup of its own on the host, as CRI names no parent for it: %w", errdefs.ErrUnavailable)
	}
	u, err := s.cgroup.Usage()
	if err != nil {
		return nil, err
	}
	return metrics.OfHost(u), nil
}
