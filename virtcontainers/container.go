package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/internal/undo"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
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
}

// A Container runs in a sandbox. Its methods are safe for concurrent use.
type Container struct {
	id, bundle string
	sandbox    *Sandbox
	undo       undo.Stack
	init       *Process

	mu    sync.Mutex
	execs map[string]*Process
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
	defer func() { err = during(err, "create container %q", cfg.ID) }()
	if !validID.MatchString(cfg.ID) {
		cfg.Stdio.close()
		return nil, fmt.Errorf("the id has other characters than letters, digits, '_', '.', '-', or is longer than 128: %w", errdefs.ErrInvalidArgument)
	}
	c := &Container{id: cfg.ID, bundle: cfg.Bundle, sandbox: s, execs: map[string]*Process{}}
	c.init = newProcess(c, "", nil, cfg.Stdio)
	if err := s.reserve(c); err != nil {
		cfg.Stdio.close()
		return nil, err
	}
	c.undo.Push("forget container", hostStep, func(context.Context) error { s.release(c); return nil })
	c.undo.Push("close standard streams", hostStep, func(context.Context) error {
		c.init.mu.Lock()
		st := c.init.streams
		c.init.mu.Unlock()
		if st == nil {
			cfg.Stdio.close()
		}
		st.close()
		return nil
	})
	if err := c.create(ctx, cfg); err != nil {
		return nil, errors.Join(err, c.undo.Run(ctx))
	}
	return c, nil
}

func (c *Container) create(ctx context.Context, cfg ContainerConfig) error {
	s := c.sandbox
	began := time.Now()
	plan, err := c.plan()
	if err != nil {
		return err
	}
	for _, w := range plan.Notes {
		s.log.Warn("spec field without meaning in a guest", "container", c.id, "field", w)
	}
	if err := s.checkSysctls(plan.Sysctls); err != nil {
		return err
	}
	if err := c.share(cfg.Rootfs, plan); err != nil {
		return err
	}
	prepared := time.Now()
	if err := s.awaitBoot(ctx); err != nil {
		return err
	}
	booted := time.Now()
	raw, err := json.Marshal(plan.Spec)
	if err != nil {
		return err
	}
	_, names, err := c.init.openStreams(ctx)
	if err != nil {
		return err
	}
	if p := plan.Spec.Process; p != nil && p.ConsoleSize != nil {
		names.Columns, names.Rows = uint32(p.ConsoleSize.Width), uint32(p.ConsoleSize.Height)
	}
	c.undo.Push("remove container in the guest", s.config.Runtime.StopTimeout.Duration, func(ctx context.Context) error {
		err := s.call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.RemoveContainer(ctx, &agentv1.RemoveContainerRequest{ContainerId: c.id})
			return err
		})
		if errdefs.IsNotFound(err) || s.lost(err) {
			return nil
		}
		return err
	})
	err = s.call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.CreateContainer(ctx, &agentv1.CreateContainerRequest{ContainerId: c.id, Spec: raw, Streams: names})
		return err
	})
	if err != nil {
		return err
	}
	s.watch(c.init)
	s.log.Info("container created", "container", c.id,
		"host", ms(prepared.Sub(began)), "wait", ms(booted.Sub(prepared)), "guest", ms(time.Since(booted)))
	return nil
}

// plan reads the bundle's spec and rewrites it for the guest.
func (c *Container) plan() (*spec.Plan, error) {
	sp, err := ReadSpec(c.bundle)
	if err != nil {
		return nil, err
	}
	return spec.Transform(sp, c.id)
}

// share puts the root file system and the bind mounts where the guest sees them.
func (c *Container) share(rootfs []mount.Mount, plan *spec.Plan) error {
	dir := filepath.Join(c.sandbox.privateDir(), c.id)
	share, err := storage.New(dir)
	if err != nil {
		return err
	}
	c.undo.Push("unshare file systems", hostStep, func(context.Context) error { return share.Close() })
	if err := share.Rootfs(rootfs, resolve(c.bundle, plan.RootPath)); err != nil {
		return err
	}
	for i, b := range plan.Binds {
		b.Source = resolve(c.bundle, b.Source)
		if err := share.Bind(i, b); err != nil {
			return err
		}
	}
	return nil
}

func resolve(bundle, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(bundle, path)
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

// ID returns the container's id.
func (c *Container) ID() string { return c.id }

// Bundle returns the directory the container was created from.
func (c *Container) Bundle() string { return c.bundle }

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

// Execs returns the execs that have not been deleted, in order of their ids.
func (c *Container) Execs() []*Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ps []*Process
	for _, p := range c.execs {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b *Process) int { return strings.Compare(a.id, b.id) })
	return ps
}

// Exec adds a process to the container; nothing runs before its Start. The
// container must run. It is AlreadyExists where the id is taken.
func (c *Container) Exec(_ context.Context, id string, process *specs.Process, stdio Stdio) (*Process, error) {
	var err error
	switch {
	case !validID.MatchString(id):
		err = fmt.Errorf("the id has other characters than letters, digits, '_', '.', '-', or is longer than 128: %w", errdefs.ErrInvalidArgument)
	case c.init.State() != Running:
		err = fmt.Errorf("the container is %s, not running: %w", c.init.State(), errdefs.ErrFailedPrecondition)
	default:
		process, err = spec.TransformProcess(process, "process")
	}
	p := newProcess(c, id, process, stdio)
	if err == nil {
		c.mu.Lock()
		if c.execs[id] != nil {
			err = errdefs.ErrAlreadyExists
		} else {
			c.execs[id] = p
		}
		c.mu.Unlock()
	}
	if err != nil {
		stdio.close()
		return nil, fmt.Errorf("exec %q in container %q: %w", id, c.id, err)
	}
	return p, nil
}

func (c *Container) forget(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, execID)
}

// Processes lists what runs in the container.
func (c *Container) Processes(ctx context.Context) ([]ProcessInfo, error) {
	var resp *agentv1.ListProcessesResponse
	err := c.sandbox.call(ctx, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.ListProcesses(ctx, &agentv1.ListProcessesRequest{ContainerId: c.id})
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	if err != nil {
		return nil, during(err, "list processes of container %q", c.id)
	}
	var ps []ProcessInfo
	for _, p := range resp.Processes {
		ps = append(ps, ProcessInfo{PID: p.Pid, ExecID: p.ExecId})
	}
	return ps, nil
}

// Delete takes the container back, whatever the guest does. It is
// FailedPrecondition while its init runs.
func (c *Container) Delete(ctx context.Context) (Exit, error) {
	if c.init.State() == Created {
		// A container that was never started ends here.
		if err := c.init.Kill(ctx, uint32(9), true); err != nil && !errdefs.IsNotFound(err) {
			return Exit{}, err
		}
		select {
		case <-c.init.Exited():
		case <-ctx.Done():
			return Exit{}, fmt.Errorf("delete container %q: %w", c.id, context.Cause(ctx))
		}
	}
	exit, err := c.init.retire()
	if err != nil {
		return Exit{}, err
	}
	for _, p := range c.Execs() {
		if st := p.State(); st == Stopped || st == Created {
			p.retire() //nolint:errcheck // it moved meanwhile: its own waiter ends it
		}
		c.forget(p.id)
	}
	if err := c.undo.Run(ctx); err != nil {
		c.sandbox.log.Error("delete container", "container", c.id, "err", err)
	}
	return exit, nil
}

// ms rounds a time for a log line.
func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
