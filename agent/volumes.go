package agent

import (
	"context"

	"github.com/containerd/errdefs"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// MountStorage implements agentv1.AgentService.
func (a service) MountStorage(_ context.Context, _ *agentv1.MountStorageRequest) (*agentv1.MountStorageResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// UnmountStorage implements agentv1.AgentService.
func (a service) UnmountStorage(_ context.Context, _ *agentv1.UnmountStorageRequest) (*agentv1.UnmountStorageResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// HoldFileSystems implements agentv1.AgentService.
func (a service) HoldFileSystems(_ context.Context, _ *agentv1.HoldFileSystemsRequest) (*agentv1.HoldFileSystemsResponse, error) {
	return nil, errdefs.ErrNotImplemented
}
