package capacity

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/resource"
)

// roomVCPUs is how many vCPUs a VM can grow to, on a host that has as many, where the
// configuration sets no maximum: the guest's kernel keeps 290 KiB for each that may come
// (decision 028).
const roomVCPUs = 8

// A Boot is what a VM boots with, and may come to.
type Boot struct {
	resource.Size
	Bounds resource.Bounds
	Host   placement.Host
	// Pin gives each vCPU of a cpuset that has as many CPUs one to itself.
	Pin bool
	// Node of the host that the memory is bound to from the start; nil: any.
	Node *int
}

// Plan decides on the VM for what is known beforehand: the limits of its containers
// together, and for a container in no pod what it is bound to. A limit above what the
// host has means all of it, as it does for a container without a VM; above a maximum that
// is configured, it is refused.
func Plan(h config.Hypervisor, l resource.Limits, first placement.Container) (Boot, error) {
	host, err := placement.ReadHost("/")
	if err != nil {
		return Boot{}, err
	}
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return Boot{}, fmt.Errorf("find the host's memory: %w", err)
	}
	return boot(h, l, first, host, int(memory.Totalram*uint64(memory.Unit)>>20))
}

func boot(h config.Hypervisor, l resource.Limits, first placement.Container, host placement.Host, hostMiB int) (Boot, error) {
	b := Boot{Host: host, Pin: h.VCPUPinning, Bounds: resource.Bounds{
		DefaultVCPUs: h.DefaultVCPUs, DefaultMemoryMiB: h.DefaultMemoryMiB, MaxVCPUs: h.MaxVCPUs, MaxMemoryMiB: h.MaxMemoryMiB,
	}}
	if h.MaxMemoryMiB == 0 {
		b.Bounds.HostMemoryMiB, b.Bounds.MaxMemoryMiB = hostMiB, hostMiB
	}
	var err error
	if h.MaxVCPUs == 0 {
		b.Bounds.HostVCPUs, b.Bounds.MaxVCPUs = len(host.CPUs), len(host.CPUs)
		if b.Size, err = b.Bounds.Boot(l); err != nil {
			return Boot{}, err
		}
		b.Bounds.MaxVCPUs = max(b.VCPUs, min(roomVCPUs, len(host.CPUs)))
	}
	b.Bounds.PossibleVCPUs = b.Bounds.MaxVCPUs
	if b.Size, err = b.Bounds.Boot(l); err != nil {
		return Boot{}, err
	}
	plan, err := placement.Place(host, b.VCPUs, b.Pin, []placement.Container{first})
	if err == nil && len(plan.Nodes) == 1 {
		b.Node = &plan.Nodes[0]
	}
	return b, err
}
