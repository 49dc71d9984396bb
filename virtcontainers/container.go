package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
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
	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/virtcontainers/refusal"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
	"github.com/husk-containers/husk/virtcontainers/streams"
	"github.com/husk-containers/husk/virtcontainers/volume"
)

// hostStep bounds one step of a container's teardown on the host.
const hostStep = 10 * time.Second

// Stdio is the host's end of a process's standard streams.
type Stdio = streams.Stdio

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

	// oomAt is when an OOM was last told of; it is watchEvents' own.
	oomAt time.Time

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
	c := &Container{id: cfg.ID, bundle: cfg.Bundle, sandbox: s, execs: map[string]*Process{}, noted: map[string]bool{}}
	c.init = newProcess(c, "", nil, cfg.Stdio)
	if cfg.Holds {
		c.init.killed = make(chan uint32, 1)
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
		c.init.closeStreams()
		c.dropExecs()
		return nil
	})
	if err := c.create(ctx, cfg); err != nil {
		return nil, errors.Join(err, c.undo.Run(ctx))
	}
	return c, nil
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
	shared, err := c.readyMounts(ctx)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(plan.Spec)
	if err != nil {
		return err
	}
	names, err := c.init.openStreams(ctx)
	if err != nil {
		return err
	}
	setSize(names, plan.Spec.Process)
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
	s.watch(c.init)
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
	if !c.sandbox.spawn(c.init.hold) {
		c.init.lose()
	}
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

// share puts the root file system where the guest sees it, and does on the host what
// the mounts need.
func (c *Container) share(ctx context.Context, rootfs []mount.Mount, plan *spec.Plan) error {
	s := c.sandbox
	s.mu.Lock()
	s.rootfs++
	c.dir = fmt.Sprintf("%s-%d", c.id, s.rootfs)
	s.mu.Unlock()
	plan.RootIn(c.dir)
	share, err := storage.New(filepath.Join(s.privateDir(), c.dir), c.bundle, s.host.Clone)
	if err != nil {
		return err
	}
	c.undo.Push("unshare the root file system", hostStep, func(context.Context) error { return share.Close() })
	if plan.Shm != nil {
		size, tmpfs, err := volume.Tmpfs(plan.Shm, c.bundle, s.host.Clone)
		if err != nil {
			return err
		}
		if tmpfs {
			plan.GuestShm(size)
		}
	}
	if err := share.Rootfs(rootfs, plan.RootPath); err != nil {
		return err
	}
	c.undo.Push("end the connections to the host's sockets", hostStep, func(ctx context.Context) error {
		return s.sockets.RemoveContainer(ctx, c.id)
	})
	user := volume.User{ID: c.id, Bundle: c.bundle, Spec: plan.Spec, CgroupsPath: plan.CgroupsPath}
	for _, b := range plan.Binds {
		if b.Unused {
			continue
		}
		m, err := s.volumes.Add(ctx, user, b)
		if err != nil {
			return err
		}
		c.mounts = append(c.mounts, m)
		c.undo.Push("give up "+b.Field, hostStep, m.Release)
	}
	return nil
}

// readyMounts does in the guest what the mounts need, and returns the guest's
// directories at which file systems of the host appear, each after the one that it is
// below.
func (c *Container) readyMounts(ctx context.Context) ([]string, error) {
	private := c.sandbox.privateDir()
	rootfs, err := storage.FileSystems(filepath.Join(private, c.dir))
	if err != nil {
		return nil, err
	}
	var below []string
	for _, dir := range rootfs {
		below = append(below, spec.GuestShare+dir[len(private):])
	}
	ctx, cancel := c.sandbox.guest.Request(ctx) // of all together: what is copied is small
	defer cancel()
	errs := make([]error, len(c.mounts))
	var work sync.WaitGroup
	for i, m := range c.mounts {
		work.Go(func() { errs[i] = m.Ready(ctx) })
	}
	work.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	for _, m := range c.mounts {
		dirs, err := m.FileSystems()
		if err != nil {
			return nil, err
		}
		below = append(below, dirs...)
	}
	return below, nil
}

// report brings the container's last words to the host.
func (c *Container) report() {
	ctx, cancel := c.sandbox.guest.Request(context.Background())
	defer cancel()
	for _, m := range c.mounts {
		if err := m.Report(ctx); err != nil && !c.sandbox.guest.Lost(err) {
			c.sandbox.log.Warn("a container's last words are lost", "container", c.id, "err", err)
		}
	}
}

// CopyIn extracts a tar archive into the directory at path, as the container's
// processes see it. The container must run. It stays half done where it fails.
func (c *Container) CopyIn(ctx context.Context, path string, archive io.Reader) error {
	err := c.sandbox.onFiles(ctx, func(conn net.Conn) error { return files.Put(ctx, conn, c.id, path, archive) })
	return refusal.During(err, "copy to %s of container %q", path, c.id)
}

// CopyOut writes a tar archive of what is at path, as the container's processes see
// it, the names in it beginning with the last element of path. What it holds is the
// guest's word. The container must run.
func (c *Container) CopyOut(ctx context.Context, path string, archive io.Writer) error {
	err := c.sandbox.onFiles(ctx, func(conn net.Conn) error { return files.Get(ctx, conn, c.id, path, archive) })
	return refusal.During(err, "copy from %s of container %q", path, c.id)
}

// onFiles has f use a connection to the guest's port of files.
func (s *Sandbox) onFiles(ctx context.Context, f func(net.Conn) error) error {
	if err := s.guest.Await(ctx); err != nil {
		return err
	}
	conn, err := s.guest.Dial(ctx, files.Port)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing more is said
	return f(conn)
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
func (c *Container) Exec(_ context.Context, id string, process *specs.Process, stdio Stdio) (*Process, error) {
	err := checkID(id)
	if err == nil && c.init.killed != nil {
		err = fmt.Errorf("it is the pod's sandbox container, in which nothing runs: %w", errdefs.ErrNotImplemented)
	}
	if state := c.init.State(); err == nil && state != Running {
		err = fmt.Errorf("the container is %s, not running: %w", state, errdefs.ErrFailedPrecondition)
	}
	var ours *specs.Process
	if err == nil {
		ours, err = spec.TransformProcess(process, "process")
	}
	p := newProcess(c, id, ours, stdio)
	if err == nil {
		err = c.add(p)
	}
	if err != nil {
		stdio.Close()
		return nil, fmt.Errorf("exec %q in container %q: %w", id, c.id, err)
	}
	c.note(spec.ProcessNotes(process, "process"))
	return p, nil
}

// add adds an exec.
func (c *Container) add(p *Process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deleted {
		return fmt.Errorf("the container has been deleted: %w", errdefs.ErrNotFound)
	}
	if c.execs[p.id] != nil {
		return errdefs.ErrAlreadyExists
	}
	c.execs[p.id] = p
	return nil
}

func (c *Container) forget(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, execID)
}

// Processes lists what runs in the container.
func (c *Container) Processes(ctx context.Context) ([]ProcessInfo, error) {
	if c.init.killed != nil {
		return nil, nil
	}
	var resp *agentv1.ListProcessesResponse
	err := c.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) (err error) {
		resp, err = a.ListProcesses(ctx, &agentv1.ListProcessesRequest{ContainerId: c.id})
		if err == nil {
			err = resp.Validate()
		}
		return err
	})
	if err != nil {
		return nil, refusal.During(err, "list processes of container %q", c.id)
	}
	var ps []ProcessInfo
	for _, p := range resp.Processes {
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
	exit, err := c.init.retire()
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
		if _, err := p.retire(); err != nil {
			// Its end is still to be told, by the guest or the VM's own.
			c.sandbox.spawn(func() {
				<-p.Exited()
				p.closeStreams()
			})
		}
	}
}

// ms rounds a time for a log line.
func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
