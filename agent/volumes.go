package agent

import (
	"context"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// MountStorage implements agentv1.AgentService.
func (a service) MountStorage(ctx context.Context, r *agentv1.MountStorageRequest) (*agentv1.MountStorageResponse, error) {
	if err := a.opts.Platform.MountStorage(ctx, r.GetStorage(), r.GetDirectories()); err != nil {
		return nil, err
	}
	return &agentv1.MountStorageResponse{}, nil
}

// UnmountStorage implements agentv1.AgentService.
func (a service) UnmountStorage(ctx context.Context, r *agentv1.UnmountStorageRequest) (*agentv1.UnmountStorageResponse, error) {
	if err := a.opts.Platform.UnmountStorage(ctx, r.GetTarget()); err != nil {
		return nil, err
	}
	return &agentv1.UnmountStorageResponse{}, nil
}

// HoldFileSystems implements agentv1.AgentService.
func (a service) HoldFileSystems(ctx context.Context, r *agentv1.HoldFileSystemsRequest) (*agentv1.HoldFileSystemsResponse, error) {
	if err := a.opts.Runtime.Hold(ctx, r.GetContainerId(), r.GetFileSystems()); err != nil {
		return nil, err
	}
	return &agentv1.HoldFileSystemsResponse{}, nil
}

// makeDevices makes the device nodes that a container's spec binds.
func (a *Agent) makeDevices(spec *specs.Spec) error {
	for _, m := range spec.Mounts {
		d, ok := agentv1.DeviceOfNode(m.Source)
		if !ok {
			continue
		}
		if err := a.opts.Platform.MakeDevice(d); err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	return nil
}
