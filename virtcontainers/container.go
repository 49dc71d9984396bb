package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/undo"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/metrics"
	"github.com/husk-containers/husk/virtcontainers/process"
	"github.com/husk-containers/husk/virtcontainers/refusal"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/volume"
)

// hostStep bounds one step of a container's teardown on the host.
const hostStep = 10 * time.Second

// ContainerConfig is what a container is made of.
type ContainerConfig struct {
	// ID is unique in the sandbox.
	ID string
	// Bundle is the directory that holds config.json.
	Bundle string
	// Rootfs are the mounts that make the root file system, in order. None: it
	// is the directory that the spec's root.path names.
	Rootfs []mount.Mount
	Stdio  Stdio
	// Holds: it is the sandbox container of a pod. It is there, and runs nothing in
	// the guest: the agent holds what the pod's containers share.
	Holds bool
}

// A Container runs in a sandbox. Its methods are safe for concurrent use.
type Container struct {
	id, bundle string
	sandbox    *Sandbox
	undo       undo.Stack
	init       *Process
	dir        string          // its own below the share; as create makes it
	mounts     []*volume.Mount // as create makes them
	created    time.Duration   // what its creation took once the guest was ready
	holds      bool            // nothing runs in it

	ooms    process.OOMs
	meter   *metrics.Meter
	devices []specs.LinuxDeviceCgroup // that it was created with, the guest's

	mu      sync.Mutex
	execs   map[string]*Process
	deleted bool
	noted   map[string]bool // notes of the spec that have been logged
	ownPID  bool            // it is in the guest, with a PID namespace of its own
}

// ProcessInfo is one process of a container.
type ProcessInfo struct {
	// PID in the guest.
	PID uint32
	// ExecID where the process is an exec's own; empty otherwise.
	ExecID string
}

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// CreateContainer makes a container whose process waits for its start. What it
// needs of the host is prepared while the guest may still be booting. On error
// nothing of the container is left.
func (s *Sandbox) CreateContainer(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	defer func() { err = refusal.During(err, "create container %q", cfg.ID) }()
	c := &Container{id: cfg.ID, bundle: cfg.Bundle, sandbox: s, holds: cfg.Holds, execs: map[string]*Process{}, noted: map[string]bool{}}
	c.init = c.newInit(cfg.Stdio)
	c.meter = metrics.NewMeter(s.guest, c.id)
	if c.holds {
		c.meter = metrics.NewMeter(s.guest, "")
	}
	err = checkID(cfg.ID)
	if err == nil {
		err = s.reserve(c)
	}
	if err != nil {
		cfg.Stdio.Close()
		return nil, err
	}
	defer s.work.Done()
	c.undo.Push("forget container", hostStep, func(context.Context) error { s.release(c); return nil })
	c.undo.Push("close standard streams", hostStep, func(context.Context) error {
		c.init.CloseStreams()
		c.dropExecs()
		return nil
	})
	if err := c.create(ctx, cfg); err != nil {
		return nil, errors.Join(err, c.undo.Run(ctx))
	}
	return c, nil
}

func (c *Container) newInit(stdio Stdio) *Process {
	return process.New(process.Options{
		Sandbox: c.sandbox.processes, Container: c.id, Stdio: stdio, Holds: c.holds, OnExit: c.exited,
		OnStart: func(took time.Duration) {
			c.sandbox.log.Info("container started", "container", c.id, "create", ms(c.created), "start", ms(took))
		},
	})
}

// exited is called before the exit of the container is told.
func (c *Container) exited(ooms uint64) {
	c.ooms.End(ooms)
	c.sandbox.capacity.Drop(c.id)
	c.sandbox.spawn(c.sandbox.capacity.Settle)
	c.report()
}

func checkID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("the id has other characters than letters, digits, '_', '.', '-', or is longer than 128: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (c *Container) create(ctx context.Context, cfg ContainerConfig) error {
	s := c.sandbox
	if cfg.Holds {
		return c.hold(ctx)
	}
	began := time.Now()
	plan, err := c.plan()
	if err != nil {
		return err
	}
	c.note(plan.Notes)
	if err := s.checkSysctls(plan.Sysctls); err != nil {
		return err
	}
	if err := c.share(ctx, cfg.Rootfs, plan); err != nil {
		return err
	}
	prepared := time.Now()
	if err := s.guest.Await(ctx); err != nil {
		return err
	}
	booted := time.Now()
	if err := c.claim(ctx, plan); err != nil {
		return err
	}
	shared, err := c.readyMounts(ctx)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(plan.Spec)
	if err != nil {
		return err
	}
	names, err := c.init.OpenStreams(ctx, plan.Spec.Process)
	if err != nil {
		return err
	}
	c.undo.Push("remove container in the guest", s.config.Runtime.StopTimeout.Duration, func(ctx context.Context) error {
		err := s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.RemoveContainer(ctx, &agentv1.RemoveContainerRequest{ContainerId: c.id})
			return err
		})
		if errdefs.IsNotFound(err) || s.guest.Lost(err) {
			return nil
		}
		return err
	})
	err = s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.CreateContainer(ctx, &agentv1.CreateContainerRequest{ContainerId: c.id, Spec: raw, Streams: names, FileSystems: shared})
		return err
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.ownPID = plan.OwnPID
	c.mu.Unlock()
	c.init.Watch()
	c.created = time.Since(booted)
	s.log.Debug("container created", "container", c.id, "host", ms(prepared.Sub(began)), "wait", ms(booted.Sub(prepared)))
	return nil
}

// plan reads the bundle's spec and rewrites it for the guest.
func (c *Container) plan() (*spec.Plan, error) {
	sp, err := ReadSpec(c.bundle)
	if err != nil {
		return nil, err
	}
	c.sandbox.files.AddTo(sp)
	plan, err := spec.Transform(sp, c.id, c.sandbox.pod)
	if err != nil {
		return nil, err
	}
	return plan, plan.JoinPID(c.sandbox.ownPIDs())
}

// hold makes a container that runs nothing, and lives until it is killed or the VM
// ends.
func (c *Container) hold(ctx context.Context) error {
	if err := c.sandbox.guest.Await(ctx); err != nil {
		return err
	}
	c.init.Watch()
	return nil
}

// note logs, once for the container, what means another thing in the guest.
func (c *Container) note(notes []string) {
	c.mu.Lock()
	notes = slices.DeleteFunc(slices.Clone(notes), func(n string) bool { return c.noted[n] })
	for _, n := range notes {
		c.noted[n] = true
	}
	c.mu.Unlock()
	for _, n := range notes {
		c.sandbox.log.Warn("the spec speaks of the host, not of the guest", "container", c.id, "field", n)
	}
}

// ReadSpec reads the OCI spec of a bundle.
func ReadSpec(bundle string) (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the bundle's spec: %w", err)
	}
	var sp specs.Spec
	if err := json.Unmarshal(raw, &sp); err != nil {
		return nil, fmt.Errorf("read the bundle's spec: config.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &sp, nil
}

// Init returns the container's own process.
func (c *Container) Init() *Process { return c.init }

// Process returns the init for an empty id, and otherwise the exec of that id or
// NotFound.
func (c *Container) Process(execID string) (*Process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("exec %q of container %q: %w", execID, c.id, errdefs.ErrNotFound)
}

// Exec adds a process to the container; nothing runs before its Start. The
// container must run. It is AlreadyExists where the id is taken.
func (c *Container) Exec(_ context.Context, id string, sp *specs.Process, stdio Stdio) (*Process, error) {
	err := checkID(id)
	if err == nil && c.holds {
		err = fmt.Errorf("it is the pod's sandbox container, in which nothing runs: %w", errdefs.ErrNotImplemented)
	}
	switch state := c.init.State(); {
	case err != nil, state == Running:
	case state == Paused:
		err = fmt.Errorf("the container is paused: resume it first: %w", errdefs.ErrFailedPrecondition)
	default:
		err = fmt.Errorf("the container is %s, not running: %w", state, errdefs.ErrFailedPrecondition)
	}
	var ours *specs.Process
	if err == nil {
		ours, err = spec.TransformProcess(sp, "process")
	}
	p := process.New(process.Options{
		Sandbox: c.sandbox.processes, Container: c.id, Exec: id, Spec: ours, Stdio: stdio,
		OnDelete: func() { c.forget(id) },
	})
	if err == nil {
		err = c.add(id, p)
	}
	if err != nil {
		stdio.Close()
		return nil, fmt.Errorf("exec %q in container %q: %w", id, c.id, err)
	}
	c.note(spec.ProcessNotes(sp, "process"))
	return p, nil
}

// add adds an exec.
func (c *Container) add(id string, p *Process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deleted {
		return fmt.Errorf("the container has been deleted: %w", errdefs.ErrNotFound)
	}
	if c.execs[id] != nil {
		return errdefs.ErrAlreadyExists
	}
	c.execs[id] = p
	return nil
}

func (c *Container) forget(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, execID)
}

// Processes lists what runs in the container.
func (c *Container) Processes(ctx context.Context) ([]ProcessInfo, error) {
	if c.holds {
		return nil, nil
	}
	processes, err := c.meter.Processes(ctx)
	if err != nil {
		return nil, refusal.During(err, "list processes of container %q", c.id)
	}
	var ps []ProcessInfo
	for _, p := range processes {
		info := ProcessInfo{PID: p.Pid}
		if _, err := c.Process(p.ExecId); err == nil { // ids are the host's
			info.ExecID = p.ExecId
		}
		ps = append(ps, info)
	}
	return ps, nil
}

// Delete takes the container back, whatever the guest does. It is
// FailedPrecondition while its init runs.
func (c *Container) Delete(ctx context.Context) (Exit, error) {
	if c.init.State() == Created {
		// A container that was never started ends here, or with the VM.
		c.init.Kill(ctx, uint32(unix.SIGKILL), true) //nolint:errcheck // its exit is told, or the guest is ended
		select {
		case <-c.init.Exited():
		case <-ctx.Done():
			return Exit{}, fmt.Errorf("delete container %q: %w", c.id, context.Cause(ctx))
		}
	}
	exit, err := c.init.Retire()
	if err != nil {
		return Exit{}, err
	}
	if err := c.undo.Run(ctx); err != nil {
		c.sandbox.log.Error("delete container", "container", c.id, "err", err)
	}
	return exit, nil
}

// dropExecs forgets the execs of a container that has ended, and takes no more.
func (c *Container) dropExecs() {
	c.mu.Lock()
	execs := slices.Collect(maps.Values(c.execs))
	clear(c.execs)
	c.deleted = true
	c.mu.Unlock()
	for _, p := range execs {
		if _, err := p.Retire(); err != nil {
			// Its end is still to be told, by the guest or the VM's own.
			c.sandbox.spawn(func(context.Context) {
				<-p.Exited()
				p.CloseStreams()
			})
		}
	}
}

// ms rounds a time for a log line.
func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
