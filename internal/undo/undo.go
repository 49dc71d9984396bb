// Package undo keeps what must be taken back, in the order it was done. The same
// stack is the error path of a construction and the teardown of what was built.
package undo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

type step struct {
	name    string
	timeout time.Duration
	f       func(context.Context) error
}

// A Stack holds steps to take back. The zero value is empty and ready. It is
// safe for concurrent use.
type Stack struct {
	mu    sync.Mutex
	steps []step
}

// Push adds a step, which will have at most timeout to complete.
func (s *Stack) Push(name string, timeout time.Duration, f func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, step{name, timeout, f})
}

// Run takes every step back, the last first, and leaves the stack empty. A step
// that fails or runs out of time does not keep the others from running; all
// errors are joined. It runs to the end although ctx may be cancelled: only the
// values of ctx are used.
func (s *Stack) Run(ctx context.Context) error {
	s.mu.Lock()
	steps := s.steps
	s.steps = nil
	s.mu.Unlock()
	var errs []error
	for _, st := range slices.Backward(steps) {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), st.timeout)
		if err := st.f(sctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", st.name, err))
		}
		cancel()
	}
	return errors.Join(errs...)
}
