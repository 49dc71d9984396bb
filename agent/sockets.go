package agent

import (
	"context"

	"github.com/containerd/errdefs"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// ListenSocket implements agentv1.AgentService.
func (a service) ListenSocket(_ context.Context, _ *agentv1.ListenSocketRequest) (*agentv1.ListenSocketResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// CloseSocket implements agentv1.AgentService.
func (a service) CloseSocket(_ context.Context, _ *agentv1.CloseSocketRequest) (*agentv1.CloseSocketResponse, error) {
	return nil, errdefs.ErrNotImplemented
}
