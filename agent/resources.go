package agent

import (
	"context"

	"github.com/containerd/errdefs"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// UpdateContainer implements agentv1.AgentService.
func (a service) UpdateContainer(context.Context, *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// PauseContainer implements agentv1.AgentService.
func (a service) PauseContainer(context.Context, *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// ResumeContainer implements agentv1.AgentService.
func (a service) ResumeContainer(context.Context, *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// StatsContainer implements agentv1.AgentService.
func (a service) StatsContainer(context.Context, *agentv1.StatsContainerRequest) (*agentv1.StatsContainerResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// OnlineResources implements agentv1.AgentService.
func (a service) OnlineResources(context.Context, *agentv1.OnlineResourcesRequest) (*agentv1.OnlineResourcesResponse, error) {
	return nil, errdefs.ErrNotImplemented
}
