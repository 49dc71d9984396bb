package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"runtime"
	"strconv"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/shim/task"
)

// The states of a sandbox in the sandbox API are CRI's.
const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

// isOurs is NotFound for another sandbox than the shim's.
func (s *Service) isOurs(id string) error {
	if id != s.id {
		return fmt.Errorf("sandbox %q: this shim has %q: %w", id, s.id, errdefs.ErrNotFound)
	}
	return nil
}

func (s *Service) createSandbox(ctx context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	if err := s.isOurs(r.SandboxID); err != nil {
		return nil, err
	}
	cfg := SandboxConfig{Hold: true, NetNS: r.NetnsPath}
	switch {
	case pod.IsConfig(r.Options):
		var err error
		if cfg.Pod, err = pod.Decode(r.Options.Value); err != nil {
			return nil, fmt.Errorf("create sandbox %q: %w", s.id, err)
		}
	case r.Options.GetTypeUrl() != "":
		slog.Warn("left out: sandbox options of a type that is not known", "type", r.Options.TypeUrl)
	}
	if len(r.Rootfs) > 0 {
		slog.Warn("left out: the sandbox's root file system: nothing runs in it")
	}
	if err := s.makeSandbox(ctx, cfg); err != nil {
		return nil, err
	}
	return &sandboxapi.CreateSandboxResponse{}, nil
}

func (s *Service) startSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	if err := s.isOurs(r.SandboxID); err != nil {
		return nil, err
	}
	sb, err := s.beginStart()
	if err != nil {
		return nil, err
	}
	if err := sb.Start(ctx); err != nil {
		return nil, fmt.Errorf("start sandbox %q: %w", s.id, err)
	}
	s.setUp()
	return &sandboxapi.StartSandboxResponse{Pid: uint32(sb.PID()), CreatedAt: timestamppb.New(sb.Created())}, nil
}

// platform is the guest's, whose machine is like the host's. containerd may ask
// before there is a sandbox.
func (s *Service) platform(_ context.Context, r *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	if err := s.isOurs(r.SandboxID); err != nil {
		return nil, err
	}
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// pingSandbox answers while the sandbox serves containers.
func (s *Service) pingSandbox(_ context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	l, err := s.lookup(r.SandboxID)
	if err == nil {
		err = l.alive()
	}
	if err != nil {
		return nil, fmt.Errorf("ping sandbox %q: %w", s.id, err)
	}
	return &sandboxapi.PingResponse{}, nil
}

func (s *Service) lookup(id string) (lifecycle, error) {
	if err := s.isOurs(id); err != nil {
		return lifecycle{}, err
	}
	return s.current()
}

func (s *Service) sandboxStatus(_ context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	l, err := s.lookup(r.SandboxID)
	if err != nil {
		return nil, err
	}
	resp := &sandboxapi.SandboxStatusResponse{
		SandboxID: s.id, State: stateNotReady, Pid: uint32(l.sandbox.PID()), CreatedAt: timestamppb.New(l.sandbox.Created()),
	}
	process := "created" // in containerd's words for a process
	switch {
	case l.gone():
		// The pid may be another process's.
		process, resp.Pid, resp.ExitedAt = "stopped", 0, timestamppb.New(l.exitedAt)
	case l.alive() == nil:
		process, resp.State = "running", stateReady
	case l.phase == started:
		process = "unknown" // on its way up or down
	}
	if r.Verbose {
		if resp.Info, err = l.info(resp, process); err != nil {
			return nil, fmt.Errorf("status of sandbox %q: %w", s.id, err)
		}
	}
	return resp, nil
}

// criInfo is what CRI's verbose status of a pod holds below "info", as far as it
// applies: containerd decodes and completes it.
type criInfo struct {
	PID           uint32      `json:"pid"`
	ProcessStatus string      `json:"processStatus"`
	RuntimeSpec   *specs.Spec `json:"runtimeSpec"`
}

// info is the verbose part of a status.
func (l lifecycle) info(st *sandboxapi.SandboxStatusResponse, process string) (map[string]string, error) {
	info := criInfo{PID: st.Pid, ProcessStatus: process}
	if l.netns != "" {
		// Where clients of CRI look for it.
		info.RuntimeSpec = &specs.Spec{Version: specs.Version, Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: l.netns}},
		}}
	}
	raw, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"pid": strconv.Itoa(int(st.Pid)), "state": st.State, "netns": l.netns, "info": string(raw),
	}, nil
}

// waitSandbox returns once the VM is gone.
func (s *Service) waitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	l, err := s.lookup(r.SandboxID)
	if err != nil {
		return nil, err
	}
	select {
	case <-l.ended:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if l, err = s.current(); err != nil {
		return nil, err
	}
	return &sandboxapi.WaitSandboxResponse{ExitStatus: exitStatus(l.sandbox), ExitedAt: timestamppb.New(l.exitedAt)}, nil
}

// stopSandboxNow stops the sandbox; the guest has timeout_secs to power off, where
// given, but no longer than the configuration says. The shim stays, and so do its
// tasks, which have exited.
func (s *Service) stopSandboxNow(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	if err := s.isOurs(r.SandboxID); err != nil {
		return nil, err
	}
	// The client may go away; what was begun is finished.
	ctx = context.WithoutCancel(ctx)
	if r.TimeoutSecs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutSecs)*time.Second)
		defer cancel()
	}
	if err := s.stopSandbox(ctx); err != nil {
		return nil, fmt.Errorf("stop sandbox %q: %w", s.id, err)
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

// shutdownSandbox ends the shim, whatever is left.
func (s *Service) shutdownSandbox(ctx context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	if err := s.isOurs(r.SandboxID); err != nil {
		return nil, err
	}
	s.end(ctx)
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

// sandboxMetrics tells what the pod costs the host: the VM, the shim and all helpers.
func (s *Service) sandboxMetrics(_ context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	l, err := s.lookup(r.SandboxID)
	if err != nil {
		return nil, err
	}
	m, err := l.sandbox.Usage()
	if err != nil {
		return nil, fmt.Errorf("metrics of sandbox %q: %w", s.id, err)
	}
	data, err := task.Metrics(m)
	if err != nil {
		return nil, fmt.Errorf("metrics of sandbox %q: %w", s.id, err)
	}
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{Timestamp: timestamppb.Now(), ID: s.id, Data: data}}, nil
}
