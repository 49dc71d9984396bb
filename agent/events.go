package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// eventBacklog is how many events wait for a host that does not read them: as many
// as there are when all the ports that are reported change at once.
const eventBacklog = 2048

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
	a.mu.Lock()
	if c := a.containers[containerID]; c != nil {
		c.ooms++
	}
	a.mu.Unlock()
	a.events.publish(&agentv1.Event{Event: &agentv1.Event_Oom{Oom: &agentv1.OOMEvent{ContainerId: containerID}}})
}

// reportListeners begins to publish which ports processes listen on.
func (a *Agent) reportListeners() error {
	if a.opts.Listeners == nil {
		return fmt.Errorf("report listeners: %w", errdefs.ErrNotImplemented)
	}
	w, err := a.opts.Listeners()
	if err != nil {
		return err
	}
	a.listen <- w // Configure comes once
	return nil
}

// watchListeners runs what reportListeners has begun.
func (a *Agent) watchListeners(ctx context.Context) error {
	select {
	case w := <-a.listen:
		return w.Run(ctx, func(e *agentv1.ListenEvent) {
			a.events.publish(&agentv1.Event{Event: &agentv1.Event_Listen{Listen: e}})
		})
	case <-ctx.Done():
		return nil
	}
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
