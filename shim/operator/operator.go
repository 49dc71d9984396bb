// Package operator serves the host's operator: the state of a shim's sandbox, its pause,
// and the memory that its guest can spare.
package operator

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

const (
	// lookTimeout bounds how long the monitor may take to name its threads: what
	// else is known is told without them then.
	lookTimeout = time.Second
	// pauseTimeout bounds a pause, which the monitor answers at once.
	pauseTimeout = 10 * time.Second
	// reclaimTimeout bounds how long a guest may take to give memory back.
	reclaimTimeout = time.Minute
)

// A Machine is a sandbox's VM as it is now.
type Machine struct {
	VCPUs, MemoryMiB       int
	MaxVCPUs, MaxMemoryMiB int
	Paused                 bool
	// Accelerator is "kvm" or "tcg"; empty where it is not known.
	Accelerator string
	// CPUs and MemoryNodes are lists as in cpuset.cpus, of what the pod was put on;
	// empty: anywhere. Pinned is set where each vCPU has one of CPUs to itself.
	CPUs, MemoryNodes string
	Pinned            bool
}

// Reclaimed is what the host held for a VM before and after it was asked for memory.
type Reclaimed struct{ BeforeMiB, AfterMiB int }

// A Sandbox is what the service needs of one. What its VM cannot do is NotImplemented.
// Errors name what was to be done.
type Sandbox interface {
	Machine() Machine
	// VCPUThreads returns the host's thread ids of the vCPUs, by their numbers.
	VCPUThreads(ctx context.Context) (map[int]int, error)
	// Pause and Resume are of the whole VM. They are FailedPrecondition where it does not
	// run, or is not paused.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Reclaim asks the guest for the memory that it does not need.
	Reclaim(ctx context.Context) (Reclaimed, error)
}

// A State is that of a container.
type State int

// States of containers.
const (
	Created State = iota + 1
	Running
	Paused
	Stopped
)

// A Container is one of the sandbox's.
type Container struct {
	ID    string
	State State
}

// A Service serves the operator of one sandbox.
type Service struct {
	sandbox    func() (Sandbox, error)
	containers func() []Container
}

// New returns the service of the sandbox that the first function returns, or of which
// it says why there is none, and of the containers that the second lists.
func New(sandbox func() (Sandbox, error), containers func() []Container) *Service {
	return &Service{sandbox: sandbox, containers: containers}
}

// Register puts the service on a server.
func (s *Service) Register(server *ttrpc.Server) { operatorv1.RegisterOperatorService(server, s) }

// Status tells what is known. It waits for the monitor at most for a second, and for
// the guest not at all.
func (s *Service) Status(ctx context.Context, _ *operatorv1.StatusRequest) (*operatorv1.StatusResponse, error) {
	sandbox, err := s.sandbox()
	if err != nil {
		return nil, edge(err)
	}
	m := sandbox.Machine()
	resp := &operatorv1.StatusResponse{
		State:       operatorv1.StatusResponse_STATE_RUNNING,
		Accelerator: m.Accelerator,
		Size:        size(m.VCPUs, m.MemoryMiB),
		Maximum:     size(m.MaxVCPUs, m.MaxMemoryMiB),
		Placement:   &operatorv1.Placement{Cpus: m.CPUs, MemoryNodes: m.MemoryNodes, Pinned: m.Pinned},
	}
	if m.Paused {
		resp.State = operatorv1.StatusResponse_STATE_PAUSED
	}
	for _, c := range s.containers() {
		resp.Containers = append(resp.Containers, &operatorv1.Container{Id: c.ID, State: operatorv1.Container_State(c.State)})
	}
	slices.SortFunc(resp.Containers, func(a, b *operatorv1.Container) int { return strings.Compare(a.Id, b.Id) })
	lctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	threads, err := sandbox.VCPUThreads(lctx)
	if err != nil {
		resp.Unknown = append(resp.Unknown, oneLine(fmt.Errorf("threads of the vCPUs: %w", err)))
	}
	for number, thread := range threads {
		resp.Vcpus = append(resp.Vcpus, &operatorv1.VCPU{Number: uint32(number), Thread: uint32(thread)})
	}
	slices.SortFunc(resp.Vcpus, func(a, b *operatorv1.VCPU) int { return cmp.Compare(a.Number, b.Number) })
	return resp, nil
}

func size(vcpus, memoryMiB int) *operatorv1.Size {
	return &operatorv1.Size{Vcpus: uint32(max(vcpus, 0)), MemoryMib: uint32(max(memoryMiB, 0))}
}

// Reclaim asks the guest for memory. One whose vCPUs stand still cannot give any.
func (s *Service) Reclaim(ctx context.Context, _ *operatorv1.ReclaimRequest) (*operatorv1.ReclaimResponse, error) {
	sandbox, err := s.sandbox()
	if err != nil {
		return nil, edge(err)
	}
	if sandbox.Machine().Paused {
		return nil, edge(fmt.Errorf("the sandbox is paused, and its guest cannot give any back: resume it first: %w", errdefs.ErrFailedPrecondition))
	}
	ctx, cancel := context.WithTimeout(ctx, reclaimTimeout)
	defer cancel()
	r, err := sandbox.Reclaim(ctx)
	if err != nil {
		return nil, edge(err)
	}
	return &operatorv1.ReclaimResponse{BeforeMib: uint64(max(r.BeforeMiB, 0)), AfterMib: uint64(max(r.AfterMiB, 0))}, nil
}

// Pause stops the VM.
func (s *Service) Pause(ctx context.Context, _ *operatorv1.PauseRequest) (*operatorv1.PauseResponse, error) {
	return &operatorv1.PauseResponse{}, edge(s.with(ctx, Sandbox.Pause))
}

// Resume has the VM go on.
func (s *Service) Resume(ctx context.Context, _ *operatorv1.ResumeRequest) (*operatorv1.ResumeResponse, error) {
	return &operatorv1.ResumeResponse{}, edge(s.with(ctx, Sandbox.Resume))
}

func (s *Service) with(ctx context.Context, act func(Sandbox, context.Context) error) error {
	sandbox, err := s.sandbox()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, pauseTimeout)
	defer cancel()
	return act(sandbox, ctx)
}

// edge is where an error's class becomes a status, and its text a line.
func edge(err error) error {
	if err == nil {
		return nil
	}
	return errgrpc.ToGRPC(line{err})
}

// line is an error whose text is a line.
type line struct{ error }

func (l line) Error() string { return oneLine(l.error) }

func (l line) Unwrap() error { return l.error }

func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}
