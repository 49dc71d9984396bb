package shim

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/shim/task"
)

// holding returns the task of the pod's sandbox container; nil: there is none.
func (s *Service) holding() *task.Task {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		if t != nil && t.Holds() {
			return t
		}
	}
	return nil
}

// pauseSandbox has the whole sandbox stand still, and the task that stands for it tell
// of that.
func (s *Service) pauseSandbox(ctx context.Context) error {
	if t := s.holding(); t != nil {
		_, err := t.Pause(ctx, &api.PauseRequest{})
		return err
	}
	l, err := s.current()
	if err != nil {
		return err
	}
	return l.sandbox.Pause(ctx)
}

// resumeSandbox has a sandbox that is paused go on.
func (s *Service) resumeSandbox(ctx context.Context) error {
	if t := s.holding(); t != nil {
		_, err := t.Resume(ctx, &api.ResumeRequest{})
		return err
	}
	l, err := s.current()
	if err != nil {
		return err
	}
	return l.sandbox.Resume(ctx)
}

// wake resumes the sandbox where it is paused.
func (s *Service) wake(ctx context.Context) error {
	l, err := s.current()
	if err != nil || !l.sandbox.Paused() {
		return nil //nolint:nilerr // there is nothing to wake
	}
	if err := s.resumeSandbox(ctx); err != nil && !errdefs.IsFailedPrecondition(err) { // another did
		return fmt.Errorf("wake the sandbox: %w", err)
	}
	return nil
}
