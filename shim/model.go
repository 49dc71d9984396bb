package shim

import (
	"context"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/runtime-spec/specs-go"

	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/virtcontainers"
)

// What the service needs of a sandbox. Its real ones are virtcontainers'.
type (
	sandbox interface {
		task.Sandbox
		Created() time.Time
		// Start waits until the guest is ready and returns why it is not.
		Start(ctx context.Context) error
		// OOMs yields the ids of containers that have an OOM to tell of.
		OOMs() <-chan string
		// Usage is what it costs the host.
		Usage() (*stats.Metrics, error)
		Pause(ctx context.Context) error
		Resume(ctx context.Context) error
		Paused() bool
		// Size, VCPUThreads and Reclaim are the operator's.
		Machine() virtcontainers.Machine
		VCPUThreads(ctx context.Context) (map[int]int, error)
		Reclaim(ctx context.Context) (before, after int, err error)
		// Done is closed when the VM is gone; Err says why, where nobody wanted it.
		Done() <-chan struct{}
		Err() error
		// Leave has the sandbox outlive its bundle.
		Leave() error
		Stop(ctx context.Context) error
	}
	publisher interface {
		Publish(ev huskevents.Event)
		Close(ctx context.Context) error
	}
)

// starter makes the service's sandbox.
type starter func(ctx context.Context, cfg SandboxConfig) (sandbox, error)

type realSandbox struct{ *virtcontainers.Sandbox }

func (s realSandbox) CreateContainer(ctx context.Context, cfg virtcontainers.ContainerConfig) (task.Container, error) {
	c, err := s.Sandbox.CreateContainer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return realContainer{c}, nil
}

type realContainer struct{ *virtcontainers.Container }

func (c realContainer) Init() task.Process { return c.Container.Init() }

func (c realContainer) Exec(ctx context.Context, id string, spec *specs.Process, io virtcontainers.Stdio) (task.Exec, error) {
	p, err := c.Container.Exec(ctx, id, spec, io)
	if err != nil {
		return nil, err
	}
	return p, nil
}
