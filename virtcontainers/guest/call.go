package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// ErrGone marks errors that come of the guest not running, or not any more.
var ErrGone = fmt.Errorf("the guest is not running: %w", errdefs.ErrUnavailable)

// deadlineSkew is how much earlier than the host the guest may see a deadline pass.
const deadlineSkew = 100 * time.Millisecond

// Request returns the context of one request to the guest.
func (g *Guest) Request(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := g.opts.RequestTimeout
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest's agent did not answer within request_timeout (%s): %w", timeout, context.DeadlineExceeded))
}

// Call makes one call to the agent with the configured deadline. Its error is a
// refusal.Error of an errdefs class, or says that the guest did not answer, is paused or
// is gone.
func (g *Guest) Call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error {
	a, err := g.enter()
	if err != nil {
		return err
	}
	defer g.leave()
	return g.call(ctx, a, f)
}

// call is Call by one that has been let in.
func (g *Guest) call(ctx context.Context, a agentv1.AgentClient, f func(context.Context, agentv1.AgentClient) error) error {
	ctx, cancel := g.Request(ctx)
	defer cancel()
	err := f(ctx, a)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, ttrpc.ErrClosed):
		// The VM ended under the call: say why, once that is known.
		select {
		case <-g.dead:
		case <-ctx.Done():
		}
		if _, nerr := g.Agent(); nerr != nil {
			return nerr
		}
		return err
	}
	err = errgrpc.ToNative(err)
	if errdefs.IsDeadlineExceeded(err) {
		// The guest keeps the same deadline, and may see it pass first.
		soon := time.NewTimer(deadlineSkew)
		defer soon.Stop()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-soon.C:
		}
	}
	return refusal.New(err)
}

// Lost tells whether err, from a call to the agent, means that the guest is gone
// rather than that the agent refused.
func (g *Guest) Lost(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, ErrGone) || errors.Is(err, context.Canceled) && g.closing.Err() != nil
}

// Agent returns the agent's client for calls without the configured deadline, which
// wait while the guest is paused; its error is ErrGone with the reason.
func (g *Guest) Agent() (agentv1.AgentClient, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state != Running && g.state != Paused {
		return nil, g.notRunning()
	}
	return g.agent, nil
}

// Dial connects to a port in the guest; see hypervisor.VM.
func (g *Guest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	vm, err := g.machine()
	if err != nil {
		return nil, err
	}
	return vm.Dial(ctx, port)
}

// Attach plugs a device in; see hypervisor.VM.
func (g *Guest) Attach(ctx context.Context, d hypervisor.Device) error {
	vm, err := g.machine()
	if err != nil {
		return err
	}
	return vm.Attach(ctx, d)
}

// Detach takes a device out; see hypervisor.VM.
func (g *Guest) Detach(ctx context.Context, id string) error {
	vm, err := g.machine()
	if err != nil {
		return err
	}
	return vm.Detach(ctx, id)
}

func (g *Guest) machine() (hypervisor.VM, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state != Running {
		return nil, g.notRunning()
	}
	return g.vm, nil
}

// notRunning is the error of a call that needs the guest; g.mu is held.
func (g *Guest) notRunning() error {
	if g.state == Paused {
		return ErrPaused
	}
	if g.err != nil {
		return fmt.Errorf("%w: %w", ErrGone, g.err)
	}
	return fmt.Errorf("%w: it is %s", ErrGone, g.state)
}
