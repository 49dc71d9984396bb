package virtcontainers

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/capacity"
	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/refusal"
	"github.com/husk-containers/husk/virtcontainers/spec"
)

// newCapacity is the table of what containers claim of the VM.
func (s *Sandbox) newCapacity(o *Options) *capacity.Table {
	return capacity.New(capacity.Options{
		Machine: s.guest, Boot: s.boot, Confine: s.confine, Processes: s.record.PIDs, BindMemory: s.bindMemory, Log: o.Log,
	})
}

// bindMemory has the pod's cgroup keep its memory, the guest's too, on nodes of the host.
func (s *Sandbox) bindMemory(nodes []int) error {
	if s.cgroup == nil {
		return nil
	}
	if nodes == nil {
		nodes = slices.Sorted(maps.Keys(s.boot.Host.Nodes))
	}
	return s.cgroup.BindMemory(placement.FormatList(nodes))
}

// confine has a container run on those CPUs of the guest alone; empty: on all.
func (s *Sandbox) confine(ctx context.Context, id, cpus string) error {
	if cpus == "" {
		cpus = agentv1.AllCPUs
	}
	return s.updateInGuest(ctx, id, &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: cpus}})
}

func (s *Sandbox) updateInGuest(ctx context.Context, id string, r *specs.LinuxResources) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.UpdateContainer(ctx, &agentv1.UpdateContainerRequest{ContainerId: id, Resources: raw})
		return err
	})
}

// claim takes the container in: the VM has what it asks for, and it is confined where
// it is bound to CPUs of the host.
func (c *Container) claim(ctx context.Context, plan *spec.Plan) error {
	s := c.sandbox
	if plan.Spec.Linux.Resources == nil {
		plan.Spec.Linux.Resources = &specs.LinuxResources{}
	}
	r := plan.Spec.Linux.Resources
	c.devices = r.Devices
	c.undo.Push("give up what it claims of the VM", s.config.Runtime.StopTimeout.Duration, func(ctx context.Context) error {
		s.capacity.Drop(c.id)
		s.capacity.Settle(ctx)
		return nil
	})
	return s.capacity.Change(ctx, c.id, capacity.Claim{Resources: r, CPUs: plan.CPUs, Mems: plan.Mems}, func(cpus string) error {
		if cpus == "" {
			return nil
		}
		if r.CPU == nil {
			r.CPU = &specs.LinuxCPU{}
		}
		r.CPU.Cpus = cpus
		return nil
	})
}

// Update changes what the container may use: in the guest at once, and the VM grows or
// shrinks with it. On error nothing has changed.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	s := c.sandbox
	guest, cpus, mems, err := spec.Resources(r)
	switch state := c.init.State(); {
	case err != nil:
	case c.holds:
		err = fmt.Errorf("it is the pod's sandbox container, in which nothing runs: update the pod's containers: %w", errdefs.ErrNotImplemented)
	case state == Stopped || state == Deleted:
		err = fmt.Errorf("the container is %s: %w", state, errdefs.ErrFailedPrecondition)
	case len(guest.Devices) > 0 && !reflect.DeepEqual(guest.Devices, c.devices):
		err = fmt.Errorf("linux.resources.devices: they stay as the container was created with: %w", errdefs.ErrNotImplemented)
	default:
		guest.Devices = nil
		claim := s.capacity.Claim(c.id).Merged(capacity.Claim{Resources: guest, CPUs: cpus, Mems: mems})
		err = s.capacity.Change(ctx, c.id, claim, func(cpus string) error {
			if claim.CPUs != "" {
				if guest.CPU == nil {
					guest.CPU = &specs.LinuxCPU{}
				}
				if guest.CPU.Cpus = cpus; cpus == "" {
					guest.CPU.Cpus = agentv1.AllCPUs
				}
			}
			return s.updateInGuest(ctx, c.id, guest)
		})
	}
	return refusal.During(err, "update container %q", c.id)
}
