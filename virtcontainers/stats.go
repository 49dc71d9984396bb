package virtcontainers

import (
	"context"

	"github.com/containerd/cgroups/v3/cgroup2/stats"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/metrics"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// Stats tells what the container uses in the guest; a pod's sandbox container, what
// all containers of the pod do, and the pod's network.
func (c *Container) Stats(ctx context.Context) (*stats.Metrics, error) {
	r := &agentv1.StatsContainerRequest{ContainerId: c.id}
	if c.holds {
		r.ContainerId = ""
	}
	var resp *agentv1.StatsContainerResponse
	err := c.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.StatsContainer(ctx, r)
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	if err != nil {
		return nil, refusal.During(err, "statistics of container %q", c.id)
	}
	return metrics.Of(resp), nil
}
