package agent

import (
	"context"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs/pkg/errgrpc"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// eventBacklog is how many events wait for a host that does not read them.
const eventBacklog = 128

// events hands each event to all who watch, and keeps it for the first who will
// while nobody does. The zero value is ready.
type events struct {
	mu       sync.Mutex
	watchers map[chan *agentv1.Event]struct{}
	kept     []*agentv1.Event // at most eventBacklog
}

// watch returns the events from now on, and those that were kept; stop ends
// them.
func (e *events) watch() (ch <-chan *agentv1.Event, stop func()) {
	c := make(chan *agentv1.Event, eventBacklog)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watchers == nil {
		e.watchers = make(map[chan *agentv1.Event]struct{})
	}
	e.watchers[c] = struct{}{}
	for _, event := range e.kept {
		c <- event // there is room for all
	}
	e.kept = nil
	return c, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, c)
	}
}

// publish does not block: a host that does not read loses events.
func (e *events) publish(event *agentv1.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	lost := false
	for c := range e.watchers {
		select {
		case c <- event:
		default:
			lost = true
		}
	}
	if len(e.watchers) == 0 {
		if lost = len(e.kept) == eventBacklog; !lost {
			e.kept = append(e.kept, event)
		}
	}
	if lost {
		slog.Warn("event lost: the host does not read", "event", event)
	}
}

// checkOOM publishes an OOM event if processes of the container were killed for
// want of memory since it was last called.
func (a *Agent) checkOOM(containerID string) {
	source, ok := a.opts.Runtime.(oomSource)
	if !ok || !source.TakeOOM(containerID) {
		return
	}
	slog.Info("out of memory", "container", containerID)
	a.events.publish(&agentv1.Event{Event: &agentv1.Event_Oom{Oom: &agentv1.OOMEvent{ContainerId: containerID}}})
}

// WatchEvents implements agentv1.AgentService. It ends with the call or with a
// Shutdown.
func (a service) WatchEvents(ctx context.Context, _ *agentv1.WatchEventsRequest, stream agentv1.Agent_WatchEventsServer) error {
	if err := a.enter(); err != nil {
		return errgrpc.ToGRPC(err)
	}
	defer a.calls.Done()
	ch, stop := a.events.watch()
	defer stop()
	for {
		select {
		case event := <-ch:
			if err := stream.Send(event); err != nil {
				return err
			}
		case <-a.shutdown:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
