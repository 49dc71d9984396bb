package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// guestText bounds what is repeated of an error that the guest wrote, in bytes.
const guestText = 2048

// errNoGuest marks errors that come of the guest being gone.
var errNoGuest = fmt.Errorf("the guest is not running: %w", errdefs.ErrUnavailable)

// A guestError is the agent's own word: it says what was being done and is one
// printable line of bounded length, whatever the guest wrote.
type guestError struct {
	text  string
	cause error // of an errdefs class
}

func (e *guestError) Error() string { return e.text }
func (e *guestError) Unwrap() error { return e.cause }

func newGuestError(err error) *guestError {
	text := err.Error()
	if len(text) > guestText {
		text = strings.ToValidUTF8(text[:guestText], "") + "..."
	}
	return &guestError{text: strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text), cause: err}
}

// during says what failed, unless the agent has said so.
func during(err error, format string, args ...any) error {
	var said *guestError
	if err == nil || errors.As(err, &said) {
		return err
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}

// call makes one call to the agent with the configured deadline. Its error is a
// guestError of an errdefs class, or says that the guest did not answer or is
// gone.
func (s *Sandbox) call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error {
	a, err := s.agentClient()
	if err != nil {
		return err
	}
	timeout := s.config.Runtime.RequestTimeout.Duration
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest's agent did not answer within request_timeout (%s): %w", timeout, context.DeadlineExceeded))
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
	return newGuestError(errgrpc.ToNative(err))
}

// lost tells whether err, from a call to the agent, means that the guest is gone
// rather than that the agent refused.
func (s *Sandbox) lost(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, errNoGuest) || errors.Is(err, context.Canceled) && s.watchCtx.Err() != nil
}
