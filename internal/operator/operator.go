// Package operator is the operator's end of the calls to a sandbox's shim.
package operator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

// Timeouts of calls. They end after the shim's own, whose errors say more.
const (
	statusTimeout  = 3 * time.Second
	pauseTimeout   = 15 * time.Second
	reclaimTimeout = 70 * time.Second
)

// Status asks a shim for the state of its sandbox.
func Status(ctx context.Context, shim statedir.Shim) (*operatorv1.StatusResponse, error) {
	resp, err := call(ctx, shim, statusTimeout, func(ctx context.Context, c operatorv1.OperatorService) (*operatorv1.StatusResponse, error) {
		return c.Status(ctx, &operatorv1.StatusRequest{})
	})
	switch {
	case errdefs.IsNotImplemented(err):
		return nil, fmt.Errorf("the shim does not serve the operator: it is one of an older build, as pods have that were started before an update: %w", err)
	case err != nil:
		return nil, err
	}
	if err := resp.Validate(); err != nil {
		return nil, fmt.Errorf("the shim's answer: %w", err)
	}
	return resp, nil
}

// Reclaim asks the guest for memory, and returns what the host held for the VM before
// and after, in MiB.
func Reclaim(ctx context.Context, shim statedir.Shim) (before, after uint64, err error) {
	resp, err := act(ctx, shim, reclaimTimeout, func(ctx context.Context, c operatorv1.OperatorService) (*operatorv1.ReclaimResponse, error) {
		return c.Reclaim(ctx, &operatorv1.ReclaimRequest{})
	})
	return resp.GetBeforeMib(), resp.GetAfterMib(), err
}

// Pause stops the VM.
func Pause(ctx context.Context, shim statedir.Shim) error {
	_, err := act(ctx, shim, pauseTimeout, func(ctx context.Context, c operatorv1.OperatorService) (*operatorv1.PauseResponse, error) {
		return c.Pause(ctx, &operatorv1.PauseRequest{})
	})
	return err
}

// Resume has it go on.
func Resume(ctx context.Context, shim statedir.Shim) error {
	_, err := act(ctx, shim, pauseTimeout, func(ctx context.Context, c operatorv1.OperatorService) (*operatorv1.ResumeResponse, error) {
		return c.Resume(ctx, &operatorv1.ResumeRequest{})
	})
	return err
}

// act calls a shim that answers. One that is stopped would do later, when it goes on, what
// its operator was told has failed.
func act[T any](ctx context.Context, shim statedir.Shim, timeout time.Duration, f func(context.Context, operatorv1.OperatorService) (*T, error)) (*T, error) {
	if _, err := Status(ctx, shim); err != nil {
		return nil, err
	}
	return call(ctx, shim, timeout, f)
}

// call connects to the shim and calls it, once.
func call[T any](ctx context.Context, shim statedir.Shim, timeout time.Duration, f func(context.Context, operatorv1.OperatorService) (*T, error)) (*T, error) {
	if shim.Address == "" {
		return nil, fmt.Errorf("the sandbox begins or ends just now, and has no shim to ask: %w", errdefs.ErrUnavailable)
	}
	tctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(tctx, "unix", shim.Address)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("nothing listens at the shim's socket, so the shim has ended, and containerd is to clean up after it: %w: %w", err, errdefs.ErrUnavailable)
	case err != nil:
		return nil, fmt.Errorf("connect to the shim: %w: %w", err, errdefs.ErrUnavailable)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close() //nolint:errcheck // the answer is there
	resp, err := f(tctx, operatorv1.NewOperatorClient(client))
	closed := errors.Is(err, ttrpc.ErrClosed)
	switch err = errgrpc.ToNative(err); {
	case err == nil:
		return resp, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case tctx.Err() != nil:
		return nil, fmt.Errorf("the shim does not answer within %v: it is stopped or hangs; containerd's log has the shim's: %w", timeout, errdefs.ErrUnavailable)
	case closed:
		return nil, fmt.Errorf("the shim has closed the connection without an answer: it ends just now, or containerd's log says why: %w", errdefs.ErrUnavailable)
	}
	return nil, err
}
