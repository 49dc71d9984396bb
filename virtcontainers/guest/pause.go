package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// ErrPaused is of a call that needs the guest while it stands still.
var ErrPaused = fmt.Errorf("the sandbox is paused: resume it first: %w", errdefs.ErrFailedPrecondition)

// Pause has the VM stand still, once the calls that are under way have been answered;
// what begins meanwhile gets ErrPaused. It is FailedPrecondition for a guest that does
// not run, and NotImplemented where the VM cannot.
func (g *Guest) Pause(ctx context.Context) error {
	idle, err := g.closeToCalls()
	if err != nil {
		return err
	}
	select {
	case <-idle:
		err = g.onPauser(func(p hypervisor.Pauser) error { return p.Pause(ctx) })
	case <-ctx.Done():
		err = fmt.Errorf("calls to the guest are under way: %w", context.Cause(ctx))
	}
	if err != nil {
		g.shift(Paused, Running) //nolint:errcheck // it has ended meanwhile
	}
	return err
}

// Resume has a paused VM go on, and sets its clock. It is FailedPrecondition for a guest
// that is not paused.
func (g *Guest) Resume(ctx context.Context) error {
	if s := g.State(); s != Paused {
		return fmt.Errorf("the sandbox is %s, not paused: %w", s, errdefs.ErrFailedPrecondition)
	}
	if err := g.onPauser(func(p hypervisor.Pauser) error { return p.Resume(ctx) }); err != nil {
		return err
	}
	if err := g.shift(Paused, Running); err != nil {
		return err
	}
	return g.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.SyncClock(ctx, &agentv1.SyncClockRequest{ClockNs: time.Now().UnixNano()})
		return err
	})
}

// closeToCalls lets no call in any more, and returns what is closed when the last has
// left.
func (g *Guest) closeToCalls() (<-chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state != Running {
		return nil, fmt.Errorf("the sandbox is %s, not running: %w", g.state, errdefs.ErrFailedPrecondition)
	}
	g.state = Paused
	idle := make(chan struct{})
	if g.calls == 0 {
		close(idle)
	} else {
		g.idle = idle
	}
	return idle, nil
}

// shift moves the state from one to another.
func (g *Guest) shift(from, to State) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state != from {
		return g.notRunning()
	}
	g.state = to
	return nil
}

func (g *Guest) onPauser(f func(hypervisor.Pauser) error) error {
	g.mu.Lock()
	p, ok := g.vm.(hypervisor.Pauser)
	g.mu.Unlock()
	if !ok {
		return fmt.Errorf("this hypervisor cannot pause a VM: %w", errdefs.ErrNotImplemented)
	}
	return f(p)
}

// enter lets a call to the agent in, which leaves at its end.
func (g *Guest) enter() (agentv1.AgentClient, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state != Running {
		return nil, g.notRunning()
	}
	g.calls++
	return g.agent, nil
}

func (g *Guest) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.calls--; g.calls == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}
