package virtcontainers

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// Pause has the VM stand still, and every container in it. It is FailedPrecondition
// for a sandbox that does not run.
func (s *Sandbox) Pause(ctx context.Context) error {
	for _, c := range s.Containers() {
		if state := c.init.State(); state == Running || state == Paused {
			if err := c.meter.Read(ctx); err != nil {
				s.log.Warn("what a container uses will not be told while it is paused", "container", c.id, "err", err)
			}
		}
	}
	if err := s.guest.Pause(ctx); err != nil {
		return fmt.Errorf("pause sandbox %q: %w", s.id, err)
	}
	s.log.Info("sandbox paused")
	return nil
}

// Resume has a paused VM go on. It is FailedPrecondition for another.
func (s *Sandbox) Resume(ctx context.Context) error {
	if err := s.guest.Resume(ctx); err != nil {
		return fmt.Errorf("resume sandbox %q: %w", s.id, err)
	}
	s.log.Info("sandbox resumed")
	return nil
}

// Paused tells whether the VM stands still.
func (s *Sandbox) Paused() bool { return s.guest.State() == guest.Paused }

// Pause freezes the container's processes; of a pod's sandbox container, the VM. It is
// FailedPrecondition where the container does not run.
func (c *Container) Pause(ctx context.Context) error {
	if c.holds {
		return c.sandbox.Pause(ctx)
	}
	err := c.init.Freeze(true)
	if err == nil {
		err = c.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.PauseContainer(ctx, &agentv1.PauseContainerRequest{ContainerId: c.id})
			return err
		})
		if err != nil {
			c.init.Freeze(false) //nolint:errcheck // it has ended meanwhile
		}
	}
	return refusal.During(err, "pause container %q", c.id)
}

// Resume has a paused container's processes go on; of a pod's sandbox container, the
// VM. It is FailedPrecondition where the container is not paused.
func (c *Container) Resume(ctx context.Context) error {
	if c.holds {
		return c.sandbox.Resume(ctx)
	}
	if state := c.init.State(); state != Paused {
		return fmt.Errorf("resume container %q: it is %s, not paused: %w", c.id, state, errdefs.ErrFailedPrecondition)
	}
	err := c.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ResumeContainer(ctx, &agentv1.ResumeContainerRequest{ContainerId: c.id})
		return err
	})
	if err == nil {
		c.init.Freeze(false) //nolint:errcheck // it has ended meanwhile
	}
	return refusal.During(err, "resume container %q", c.id)
}
