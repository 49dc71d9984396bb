package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// errNoGuest marks errors that come of the guest being gone.
var errNoGuest = fmt.Errorf("the guest is not running: %w", errdefs.ErrUnavailable)

// request returns the context of one request to the guest.
func (s *Sandbox) request(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := s.config.Runtime.RequestTimeout.Duration
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest's agent did not answer within request_timeout (%s): %w", timeout, context.DeadlineExceeded))
}

// call makes one call to the agent with the configured deadline. Its error is a
// refusal.Error of an errdefs class, or says that the guest did not answer or is
// gone.
func (s *Sandbox) call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error {
	a, err := s.agentClient()
	if err != nil {
		return err
	}
	ctx, cancel := s.request(ctx)
	defer cancel()
	err = f(ctx, a)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, ttrpc.ErrClosed):
		// The VM ended under the call: say why, once that is known.
		select {
		case <-s.dead:
		case <-ctx.Done():
		}
		if _, nerr := s.agentClient(); nerr != nil {
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

// deadlineSkew is how much earlier than the host the guest may see a deadline pass.
const deadlineSkew = 100 * time.Millisecond

// lost tells whether err, from a call to the agent, means that the guest is gone
// rather than that the agent refused.
func (s *Sandbox) lost(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, errNoGuest) || errors.Is(err, context.Canceled) && s.watchCtx.Err() != nil
}
