package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"reflect"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// devicesAlone returns the spec for crun. Of the resources it has devices, which are an
// eBPF program; the files of the cgroup are written by cgroup.Dir.Limit, at create as at
// an update, for crun leaves out in silence what it does not know.
func devicesAlone(spec *specs.Spec) *specs.Spec {
	if spec.Linux.Resources == nil {
		return spec
	}
	linux := *spec.Linux
	linux.Resources = &specs.LinuxResources{Devices: devicesOf(spec.Linux.Resources)}
	out := *spec
	out.Linux = &linux
	return &out
}

func devicesOf(r *specs.LinuxResources) []specs.LinuxDeviceCgroup {
	if r == nil {
		return nil
	}
	return r.Devices
}

// Update implements Runtime.
func (c *Crun) Update(_ context.Context, id string, r *specs.LinuxResources) error {
	c.mu.Lock()
	devices := c.devices[id]
	c.mu.Unlock()
	err := error(nil)
	if len(r.Devices) > 0 && !reflect.DeepEqual(r.Devices, devices) {
		err = fmt.Errorf("resources: devices: what a container may use of them is settled when it is created: %w", errdefs.ErrInvalidArgument)
	} else {
		err = c.cgroup(id).Limit(r)
	}
	if err != nil {
		return fmt.Errorf("update container %q: %w", id, err)
	}
	return nil
}

// Pause implements Runtime.
func (c *Crun) Pause(ctx context.Context, id string) error {
	if err := c.cgroup(id).Freeze(ctx); err != nil {
		return fmt.Errorf("pause container %q: %w", id, err)
	}
	return nil
}

// Resume implements Runtime.
func (c *Crun) Resume(ctx context.Context, id string) error {
	if err := c.cgroup(id).Thaw(ctx); err != nil {
		return fmt.Errorf("resume container %q: %w", id, err)
	}
	return nil
}

// Stats implements Runtime.
func (c *Crun) Stats(_ context.Context, id string) (*agentv1.StatsContainerResponse, error) {
	s, err := c.cgroup(id).Stats()
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", id, err)
	}
	return s, nil
}
