package virtcontainers

import (
	"context"
	"crypto/rand"
	"os"
	"time"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/resource"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/uplink"
)

const (
	// shareTag is the virtio-fs tag of the directory that holds the containers'
	// file systems.
	shareTag = "husk"
	// entropyBytes are given to the guest's random pool at boot.
	entropyBytes = 256
)

// machine makes the sandbox's network, and returns what its VM is made of and what
// its agent is told.
func (s *Sandbox) machine(ctx context.Context, g *guest.Guest) (hypervisor.Config, func() *agentv1.ConfigureRequest, error) {
	up, err := uplink.Open(ctx, uplink.Options{
		Network: s.network, Config: s.config.Network, Queues: s.boot.VCPUs,
		Guest: g, Started: s.started, Log: s.log,
	})
	if err != nil {
		return hypervisor.Config{}, nil, err
	}
	s.uplink = up // before the guest's first event
	s.undo.Push("close the network", hostStep, up.Close)
	s.spawn(up.Run)
	devices := []hypervisor.Device{hypervisor.Share{Tag: shareTag, Dir: s.shareDir()}}
	for _, nic := range up.NICs() {
		devices = append(devices, nic)
	}
	configure := func() *agentv1.ConfigureRequest {
		req := s.configuration()
		req.Network, req.ReportListeners = up.Guest(), up.WantsListeners()
		return req
	}
	return hypervisor.Config{
		ID:           s.id,
		Dir:          s.dir,
		VCPUs:        s.boot.VCPUs,
		MemoryMiB:    s.boot.MemoryMiB,
		MaxVCPUs:     s.boot.Bounds.MaxVCPUs,
		MaxMemoryMiB: s.boot.Bounds.MaxMemoryMiB,
		MemoryNode:   s.boot.Node,
		Kernel:       s.config.Guest.Kernel,
		Initrd:       s.config.Guest.Initrd,
		KernelParams: "husk.log=" + string(s.config.Guest.LogLevel) + " " + resource.KernelParams(s.boot.Size) + " " + s.config.Guest.KernelParams,
		Devices:      devices,
		Started:      s.started,
	}, configure, nil
}

// started has a process on record.
func (s *Sandbox) started(p hypervisor.Process) error { return s.record.Add(p.Name, p.PID) }

// hostname is what was asked for, or the host's, as in a container without a VM.
func hostname(asked string) string {
	if asked != "" {
		return asked
	}
	name, err := os.Hostname()
	if err != nil || len(name) > 64 { // the guest's kernel takes 64 bytes
		return ""
	}
	return name
}

func (s *Sandbox) configuration() *agentv1.ConfigureRequest {
	entropy := make([]byte, entropyBytes)
	rand.Read(entropy) //nolint:errcheck // never fails since Go 1.24
	req := &agentv1.ConfigureRequest{
		SandboxId: s.id,
		Hostname:  s.hostname,
		ClockNs:   time.Now().UnixNano(),
		Entropy:   entropy,
		ShmBytes:  s.shmBytes,
		Storages: []*agentv1.Storage{{
			Kind: agentv1.Storage_KIND_VIRTIOFS, Source: shareTag, Target: spec.GuestShare,
		}},
	}
	if s.cgroup != nil {
		// The host's limit does not count what runs in the guest.
		most, limited, err := s.cgroup.PidsMax()
		if err != nil {
			s.log.Warn("the pod's limit of processes is not known, and does not hold in the guest", "err", err)
		}
		if limited {
			req.PidsMax = max(1, most)
		}
	}
	for k, v := range s.sysctls {
		req.Sysctls = append(req.Sysctls, &agentv1.Sysctl{Key: k, Value: v})
	}
	return req
}

// onEvent hands on what the guest reports, as far as it is about what the host
// knows.
func (s *Sandbox) onEvent(e *agentv1.Event) {
	if oom := e.GetOom(); oom != nil {
		if c, err := s.Container(oom.ContainerId); err == nil && c.ooms.Add(time.Now()) {
			c.wake()
		}
	}
	if l := e.GetListen(); l != nil {
		s.uplink.Listen(l)
	}
	if e := e.GetSocket(); e != nil {
		s.sockets.Event(e)
	}
}
