package agenttest

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Platform does nothing to the machine and remembers what it was told. The
// zero value is ready.
type Platform struct {
	// Sysctls that there are; nil: any.
	Sysctls map[string]bool
	// Devices that there are; nil: any.
	Devices map[agentv1.Device]bool
	// NetworkError is what SetNetwork answers.
	NetworkError error

	mu       sync.Mutex
	calls    []string
	networks []*agentv1.Network
	cpus     int    // in use
	memory   uint64 // bytes
}

// Calls returns what was asked for, in order, such as `hostname "pod"`.
func (p *Platform) Calls() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string{}, p.calls...)
}

func (p *Platform) add(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, fmt.Sprintf(format, args...))
}

// SetHostname implements agent.Platform.
func (p *Platform) SetHostname(name string) error {
	p.add("hostname %q", name)
	return nil
}

// SetClock implements agent.Platform.
func (p *Platform) SetClock(t time.Time) error {
	p.add("clock %d", t.UnixNano())
	return nil
}

// AddEntropy implements agent.Platform.
func (p *Platform) AddEntropy(b []byte) error {
	p.add("entropy %d", len(b))
	return nil
}

// SetSysctl implements agent.Platform.
func (p *Platform) SetSysctl(key, value string) error {
	if p.Sysctls != nil && !p.Sysctls[key] {
		return fmt.Errorf("set sysctl %s: %w", key, os.ErrNotExist)
	}
	p.add("sysctl %s=%s", key, value)
	return nil
}

// MountStorage implements agent.Platform.
func (p *Platform) MountStorage(_ context.Context, s *agentv1.Storage, directories []*agentv1.Directory) error {
	if s.GetKind() == agentv1.Storage_KIND_VIRTIOFS {
		p.add("mount %s on %s readonly=%t", s.GetSource(), s.GetTarget(), s.GetReadOnly())
	} else {
		p.add("mount %s on %s size=%d mode=%o directories=%d", s.GetKind(), s.GetTarget(), s.GetSizeBytes(), s.GetMode(), len(directories))
	}
	return nil
}

// UnmountStorage implements agent.Platform.
func (p *Platform) UnmountStorage(_ context.Context, target string) error {
	p.add("unmount %s", target)
	return nil
}

// MakeDevice implements agent.Platform.
func (p *Platform) MakeDevice(d agentv1.Device) error {
	if p.Devices != nil && !p.Devices[d] {
		return fmt.Errorf("device %c %d:%d: %w", d.Kind, d.Major, d.Minor, errdefs.ErrNotFound)
	}
	p.add("device %c %d:%d", d.Kind, d.Major, d.Minor)
	return nil
}

// SetNetwork implements agent.Platform.
func (p *Platform) SetNetwork(_ context.Context, n *agentv1.Network) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.NetworkError != nil {
		return p.NetworkError
	}
	p.networks = append(p.networks, proto.Clone(n).(*agentv1.Network))
	names := make([]string, 0, len(n.GetInterfaces()))
	for _, i := range n.GetInterfaces() {
		names = append(names, i.GetName())
	}
	p.calls = append(p.calls, fmt.Sprintf("network %q", names))
	return nil
}

// Networks returns the networks that were set, in order.
func (p *Platform) Networks() []*agentv1.Network {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.networks)
}

// MountShm implements agent.Platform.
func (p *Platform) MountShm(target string, bytes uint64) error {
	p.add("shm %s %d", target, bytes)
	return nil
}

// SetPidsMax implements agent.Platform.
func (p *Platform) SetPidsMax(n uint64) error {
	p.add("pids max %d", n)
	return nil
}

// Interfaces implements agent.Platform: there is one, with constant counts.
func (*Platform) Interfaces() ([]*agentv1.InterfaceStats, error) {
	return []*agentv1.InterfaceStats{{
		Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8,
	}}, nil
}

// Online implements agent.Platform: whatever is asked for is there; of what is not, there
// is 1 CPU and 1 GiB at first. Half of it is available.
func (p *Platform) Online(_ context.Context, cpus int, memoryBytes uint64) (*agentv1.OnlineResourcesResponse, error) {
	p.add("online %d CPUs, %d bytes", cpus, memoryBytes)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cpus = cmp.Or(cpus, p.cpus, 1)
	p.memory = cmp.Or(memoryBytes, p.memory, 1<<30)
	return &agentv1.OnlineResourcesResponse{Cpus: uint32(p.cpus), MemoryBytes: p.memory, AvailableBytes: p.memory / 2}, nil
}

// Sync implements agent.Platform.
func (p *Platform) Sync(time.Duration) { p.add("sync") }
