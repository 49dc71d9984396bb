package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// service is the Agent as the protocol sees it. Requests come validated.
type service struct{ *Agent }

var _ agentv1.AgentService = service{}

// Hello implements agentv1.AgentService.
func (a service) Hello(context.Context, *agentv1.HelloRequest) (*agentv1.HelloResponse, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	a.mu.Lock()
	ready := a.ready
	a.mu.Unlock()
	return &agentv1.HelloResponse{
		Version:       a.opts.Version,
		KernelRelease: unix.ByteSliceToString(uts.Release[:]),
		AgentStartUs:  uint64(a.opts.Started.Microseconds()),
		AgentReadyUs:  uint64(ready.Microseconds()),
	}, nil
}

// Configure implements agentv1.AgentService. All of it is tried, so that the
// error holds all that is wrong.
func (a service) Configure(ctx context.Context, r *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	a.mu.Lock()
	again := a.configured
	a.configured = true
	a.mu.Unlock()
	if again {
		return nil, fmt.Errorf("configure sandbox: it is configured already: %w", errdefs.ErrFailedPrecondition)
	}
	errs := []error{a.opts.Platform.SetClock(time.Unix(0, r.GetClockNs()))}
	if name := r.GetHostname(); name != "" {
		errs = append(errs, a.opts.Platform.SetHostname(name))
	}
	if b := r.GetEntropy(); len(b) > 0 {
		errs = append(errs, a.opts.Platform.AddEntropy(b))
	}
	if n := r.GetNetwork(); n != nil { // before the sysctls, which may name its interfaces
		errs = append(errs, a.setNetwork(ctx, n))
	}
	for _, s := range r.GetSysctls() {
		errs = append(errs, a.opts.Platform.SetSysctl(s.GetKey(), s.GetValue()))
	}
	for _, s := range r.GetStorages() {
		errs = append(errs, a.opts.Platform.MountStorage(ctx, s, nil))
	}
	errs = append(errs, a.opts.Platform.MountShm(agentv1.SharedShm, cmp.Or(r.GetShmBytes(), defaultShm)))
	errs = append(errs, a.opts.Platform.SetPidsMax(r.GetPidsMax()))
	if r.GetReportListeners() {
		errs = append(errs, a.reportListeners())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure sandbox: %w", err)
	}
	return &agentv1.ConfigureResponse{}, nil
}

// SyncClock implements agentv1.AgentService.
func (a service) SyncClock(_ context.Context, r *agentv1.SyncClockRequest) (*agentv1.SyncClockResponse, error) {
	if err := a.opts.Platform.SetClock(time.Unix(0, r.GetClockNs())); err != nil {
		return nil, err
	}
	return &agentv1.SyncClockResponse{}, nil
}

// Shutdown implements agentv1.AgentService. Once it has been called no other
// call is let in; Serve returns when its answer is sent.
func (a service) Shutdown(ctx context.Context, _ *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	a.mu.Lock()
	a.closing = true
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	a.killAll(ctx)
	a.opts.Platform.Sync(shutdownTimeout)
	a.shutdownOnce.Do(func() { close(a.shutdown) })
	return &agentv1.ShutdownResponse{}, nil
}

// UpdateNetwork implements agentv1.AgentService.
func (a service) UpdateNetwork(ctx context.Context, r *agentv1.UpdateNetworkRequest) (*agentv1.UpdateNetworkResponse, error) {
	if err := a.setNetwork(ctx, r.GetNetwork()); err != nil {
		return nil, err
	}
	return &agentv1.UpdateNetworkResponse{}, nil
}

func (a *Agent) setNetwork(ctx context.Context, n *agentv1.Network) error {
	ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
	defer cancel()
	return a.opts.Platform.SetNetwork(ctx, n)
}
