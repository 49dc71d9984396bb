// Package hypervisor declares what Husk asks of a virtual machine monitor: the
// interfaces and their plain-data configuration, and what makes that valid.
package hypervisor

import (
	"context"
	"errors"
	"net"
	"os"
)

// A Hypervisor boots virtual machines of one kind.
type Hypervisor interface {
	// Check tells what this host offers. It fails where that does not suffice for
	// a VM: the error joins a line for each thing missing, with what mends it, and
	// the same is in Capabilities.
	Check(ctx context.Context) (Capabilities, error)
	// Start boots a VM. Everything known beforehand is in cfg: there is no
	// half-configured VM. On error nothing is left running or open. ctx bounds
	// the start only; the VM outlives it.
	Start(ctx context.Context, cfg Config) (VM, error)
}

// A VM is one running machine. Its methods are safe for concurrent use.
type VM interface {
	// PID is the monitor's process id on the host.
	PID() int
	// Dial connects to a port in the guest. The connection half-closes: it has
	// a method CloseWrite() error.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Accept waits for the control connection that the guest dials as its first
	// act; having it is readiness. It fails with Err when the VM ends first.
	Accept(ctx context.Context) (net.Conn, error)
	// Attach plugs a device into the running guest. It has returned before the guest
	// has seen the device. NotImplemented for a kind that cannot be plugged,
	// AlreadyExists where the id is taken; on error nothing is left.
	Attach(ctx context.Context, d Device) error
	// Detach takes out the device of that id, once the guest has let go of it. It is
	// idempotent.
	Detach(ctx context.Context, id string) error
	// Stop ends the VM and every helper process of it, and releases what Start
	// took. It is idempotent; it kills at once when ctx has ended. The guest is
	// asked nothing here.
	Stop(ctx context.Context) error
	// Done is closed when the VM has ended, of itself or by Stop: the monitor or
	// a helper it cannot live without has exited and everything is released.
	Done() <-chan struct{}
	// Err says why in one line, after Done: the exit status, the end of its
	// stderr, that the guest powered itself off, the guest's last console lines. It
	// is an ErrKilled or an ErrGuestOOM where that is why, and nil after a Stop.
	Err() error
}

// ErrKilled is the end of a monitor, or of a helper process of it, by a SIGKILL that
// is not Stop's: the OOM killer's, which the cgroup's counters tell, or anybody's.
var ErrKilled = errors.New("killed by SIGKILL")

// ErrGuestOOM is the end of a guest whose kernel had no memory left and nothing more to
// kill for it. The guest says so itself.
var ErrGuestOOM = errors.New("the guest ran out of memory")

// Capabilities is what a host offers to VMs of one kind.
type Capabilities struct {
	// Version of the monitor, such as "7.2.22".
	Version Capability
	// Accelerator that Start will use: "kvm" or "tcg".
	Accelerator Capability
	// Channel that Start will use: "vhost-vsock" or "virtio-serial".
	Channel Capability
}

// A Capability is one thing that a VM needs, as this host has it.
type Capability struct {
	// Value is what there is; empty where there is nothing that serves.
	Value string
	// Reason says in one line why Value is not the best, or is empty, and what
	// mends that. It is empty where the best is there, or the configuration wants
	// no better.
	Reason string
}

// Err returns the reasons why no VM can be booted, joined, or nil.
func (c Capabilities) Err() error {
	var errs []error
	for _, one := range []Capability{c.Version, c.Accelerator, c.Channel} {
		if one.Value == "" {
			errs = append(errs, errors.New(one.Reason))
		}
	}
	return errors.Join(errs...)
}

// Config is all that is known of a VM before it boots.
type Config struct {
	// ID names the VM in logs and process titles: [A-Za-z0-9_.-], at most 128.
	ID string
	// Dir is an existing directory of this VM's own to which nobody else may
	// write: what needs a name on the host for a moment has it there. Its owner
	// removes it after Stop, or after a Start that did not come to its end.
	Dir string
	// VCPUs is at least 1.
	VCPUs int
	// MemoryMiB of guest RAM, at least 64.
	MemoryMiB int
	// MaxVCPUs and MaxMemoryMiB are what a Resizer may come to; less than the above
	// means that it stays as it is.
	MaxVCPUs, MaxMemoryMiB int
	// MemoryNode is the host's NUMA node that the guest's memory is bound to; nil: any.
	MemoryNode *int
	// Kernel and Initrd are host paths.
	Kernel string
	Initrd string
	// KernelParams follow Husk's own on the guest's command line.
	KernelParams string
	// Devices present from the start.
	Devices []Device
	// Started, if not nil, is called for each host process right after it was
	// spawned, so that its owner can have it on record. An error from it fails
	// Start.
	Started func(Process) error
}

// A Process is a host process that belongs to a VM.
type Process struct {
	// Name is the program's, such as "qemu" or "virtiofsd".
	Name string
	PID  int
}

// A Device is one of Share and NIC (and later Block, VFIO).
type Device interface{ device() }

// A Share is a host directory that the guest can mount by virtio-fs.
type Share struct {
	// Tag names it in the guest: 1 to 35 bytes.
	Tag string
	// Dir is the host directory. Mounts made below it later are seen too.
	Dir string
}

// A NIC is a network interface of the guest, which knows it by its MAC address.
// Exactly one of Taps and Stream is set. The files stay their owner's, who may
// close them once Start or Attach has returned.
type NIC struct {
	// ID names the device in the VM: 1 to 32 of [a-z0-9-].
	ID string
	// MAC is a unicast address of six bytes.
	MAC net.HardwareAddr
	// MTU of the link, 68 to 65535.
	MTU int
	// Taps are the queues of one tap device, opened with IFF_VNET_HDR, and with
	// IFF_MULTI_QUEUE where there are several.
	Taps []*os.File
	// Vhost is one open /dev/vhost-net for each of Taps; empty: the monitor copies
	// itself.
	Vhost []*os.File
	// Stream is a connected unix stream socket to a user-mode network: each frame
	// follows its length in four bytes, big-endian.
	Stream *os.File
}

func (Share) device() {}
func (NIC) device()   {}
