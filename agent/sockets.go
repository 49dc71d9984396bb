package agent

import (
	"context"

	"github.com/husk-containers/husk/agent/socket"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// ListenSocket implements agentv1.AgentService.
func (a service) ListenSocket(_ context.Context, r *agentv1.ListenSocketRequest) (*agentv1.ListenSocketResponse, error) {
	err := a.sockets.Listen(socket.Socket{
		ID: r.GetSocketId(), Mode: r.GetMode(), UID: r.GetUid(), GID: r.GetGid(), Over: r.GetOver(),
	})
	if err != nil {
		return nil, err
	}
	return &agentv1.ListenSocketResponse{}, nil
}

// CloseSocket implements agentv1.AgentService.
func (a service) CloseSocket(_ context.Context, r *agentv1.CloseSocketRequest) (*agentv1.CloseSocketResponse, error) {
	if err := a.sockets.Close(r.GetSocketId()); err != nil {
		return nil, err
	}
	return &agentv1.CloseSocketResponse{}, nil
}

// reportConnection tells the host of a connection to one of its sockets.
func (a *Agent) reportConnection(id string, connection uint64) {
	a.events.publish(&agentv1.Event{Event: &agentv1.Event_Socket{Socket: &agentv1.SocketEvent{SocketId: id, Connection: connection}}})
}
