package agent

import (
	"context"
	"fmt"
	"os"
	"strings"

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
func (a *Agent) reportConnection(c socket.Connection) {
	a.events.publish(&agentv1.Event{Event: &agentv1.Event_Socket{Socket: &agentv1.SocketEvent{
		SocketId: c.Socket, Connection: c.Number, ContainerId: a.containerOf(c.PID),
	}}})
}

// containerOf tells by its cgroup which container a process is of; empty: none, or it
// has ended.
func (a *Agent) containerOf(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	_, path, _ := strings.Cut(string(raw), "0::/")
	path, _, _ = strings.Cut(path, "\n")
	// That of all containers, the container's, and what it may have made below that.
	elements := strings.Split(path, "/")
	if len(elements) < 2 {
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.containers[elements[1]] == nil {
		return ""
	}
	return elements[1]
}
