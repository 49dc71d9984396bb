package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent/cgroup"
	"github.com/husk-containers/husk/agent/pause"
	"github.com/husk-containers/husk/agent/reap"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	// commandTimeout bounds one command of the OCI runtime.
	commandTimeout = 60 * time.Second
	// killTimeout bounds the wait for killed processes to be gone.
	killTimeout = 10 * time.Second
)

// Crun is the Runtime that drives crun, or an OCI runtime with the same command
// line, such as runc.
type Crun struct {
	cfg   CrunConfig
	table *reap.Table
	oom   *cgroup.OOMWatch

	fileSystems *fileSystems

	mu sync.Mutex
	// By container:
	held    map[string][]string                  // of fileSystems
	inits   map[string]*reap.Process             // its first process
	devices map[string][]specs.LinuxDeviceCgroup // what it may use
}

// CrunConfig says where things are. Every path is absolute.
type CrunConfig struct {
	// Command is the OCI runtime's binary.
	Command string
	// Dir holds the bundles and the runtime's own state. It is short: a unix
	// socket is made in it.
	Dir string
	// Cgroup is the directory, in the cgroup v2 hierarchy, whose
	// subdirectories of the containers' names are the containers' cgroups.
	Cgroup string
	// SharedPID is the PID namespace that containers whose spec names its path
	// share. Nil: there is none. Besides it a spec may name another container's, by
	// agentv1.ContainerPID.
	SharedPID *pause.Namespace
}

// NewCrun returns a Crun. Its commands and containers are owned by table.
// go-runc has one monitor for the whole program, and so a program has one Crun.
func NewCrun(cfg CrunConfig, table *reap.Table) (*Crun, error) {
	for _, dir := range []string{cfg.Dir, filepath.Join(cfg.Dir, "containers"), filepath.Join(cfg.Dir, "log"), cfg.Cgroup} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("set up %s: %w", cfg.Command, err)
		}
	}
	oom, err := cgroup.NewOOMWatch()
	if err != nil {
		return nil, fmt.Errorf("set up %s: %w", cfg.Command, err)
	}
	runc.Monitor = table.Monitor()
	return &Crun{
		cfg: cfg, table: table, oom: oom, fileSystems: newFileSystems(),
		held: make(map[string][]string), inits: make(map[string]*reap.Process),
		devices: make(map[string][]specs.LinuxDeviceCgroup),
	}, nil
}

func (c *Crun) bundle(id string) string     { return filepath.Join(c.cfg.Dir, "containers", id) }
func (c *Crun) cgroup(id string) cgroup.Dir { return cgroup.Dir(filepath.Join(c.cfg.Cgroup, id)) }

func (c *Crun) command(log string) *runc.Runc {
	return &runc.Runc{
		Command:   c.cfg.Command,
		Root:      filepath.Join(c.cfg.Dir, "crun"),
		Log:       log,
		LogFormat: runc.JSON,
	}
}

// Create implements Runtime.
func (c *Crun) Create(ctx context.Context, id string, spec *specs.Spec, directories []string, stdio Stdio) (*Process, error) {
	p, err := c.create(ctx, id, spec, directories, stdio)
	if err == nil {
		return p, nil
	}
	err = fmt.Errorf("create container %q: %w", id, err)
	if errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	return nil, errors.Join(err, c.Delete(context.WithoutCancel(ctx), id))
}

func (c *Crun) create(ctx context.Context, id string, spec *specs.Spec, directories []string, stdio Stdio) (_ *Process, err error) {
	dir := c.bundle(id)
	if err := os.Mkdir(dir, 0o711); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil, errdefs.ErrAlreadyExists
		}
		return nil, err
	}
	c.mu.Lock()
	c.held[id] = nil
	c.mu.Unlock()
	if err := c.Hold(ctx, id, directories); err != nil {
		return nil, err
	}
	if root, err := os.Stat(spec.Root.Path); err != nil || !root.IsDir() {
		return nil, fmt.Errorf("root file system %q: no such directory in the guest: check the snapshot and the share it comes by: %w",
			spec.Root.Path, errdefs.ErrNotFound)
	}
	joined, err := c.joinPID(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer joined.close()
	sources, err := openSources(filepath.Join(dir, "sources"), agentv1.VolumesDir, spec)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, sources.close()) }()
	resources := spec.Linux.Resources
	config, err := json.Marshal(devicesAlone(spec))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.devices[id] = devicesOf(resources)
	c.mu.Unlock()
	p, err := c.launch(ctx, filepath.Join(dir, "init"), spec.Process, stdio, func(ctx context.Context, l launch) error {
		opts := &runc.CreateOpts{IO: l.io, PidFile: l.pidFile}
		if l.socket != nil {
			opts.ConsoleSocket = l.socket
		}
		return c.command(l.log).Create(ctx, id, dir, opts)
	})
	if err != nil {
		return nil, joined.explain(err)
	}
	c.mu.Lock()
	c.inits[id] = p.Process
	c.mu.Unlock()
	c.oom.Add(id, c.cgroup(id))
	if resources != nil { // the process waits for Start
		if err := c.cgroup(id).Limit(resources); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Hold implements Runtime.
func (c *Crun) Hold(ctx context.Context, id string, directories []string) error {
	c.mu.Lock()
	have, ok := c.held[id]
	directories = slices.DeleteFunc(slices.Clone(directories), func(dir string) bool { return slices.Contains(have, dir) })
	c.mu.Unlock()
	var held []string
	var err error
	if ok {
		if held, err = c.fileSystems.hold(ctx, directories); err != nil {
			return err
		}
		c.mu.Lock()
		if have, ok = c.held[id]; ok {
			c.held[id] = slices.Concat(have, held)
		}
		c.mu.Unlock()
	}
	if !ok { // or no longer
		return errors.Join(fmt.Errorf("hold file systems: container %q: %w", id, errdefs.ErrNotFound), c.fileSystems.release(held))
	}
	return nil
}

// Start implements Runtime.
func (c *Crun) Start(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	log := filepath.Join(c.cfg.Dir, "log", "start-"+id) // there may be no bundle
	defer os.Remove(log)
	if err := c.command(log).Start(ctx, id); err != nil {
		return fmt.Errorf("start container %q: %w", id, explain(nil, log, err))
	}
	return nil
}

// Exec implements Runtime.
func (c *Crun) Exec(ctx context.Context, id, execID string, process *specs.Process, stdio Stdio) (*Process, error) {
	stem := filepath.Join(c.bundle(id), "exec-"+execID)
	p, err := c.launch(ctx, stem, process, stdio, func(ctx context.Context, l launch) error {
		opts := &runc.ExecOpts{IO: l.io, PidFile: l.pidFile, Detach: true}
		if l.socket != nil {
			opts.ConsoleSocket = l.socket
		}
		return c.command(l.log).Exec(ctx, id, *process, opts)
	})
	if err != nil {
		return nil, fmt.Errorf("exec %q in container %q: %w", execID, id, err)
	}
	return p, nil
}

// A launch is what a command that makes a process is given.
type launch struct {
	io      runc.IO
	log     string
	pidFile string
	socket  *consoleSocket // nil without a terminal
}

// launch runs a command that makes a process and takes the process over. Its
// log and pid file are called stem with a suffix, and are removed.
func (c *Crun) launch(ctx context.Context, stem string, spec *specs.Process, stdio Stdio, run func(context.Context, launch) error) (_ *Process, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	l := launch{log: stem + ".log", pidFile: stem + ".pid"}
	defer os.Remove(l.log)
	defer os.Remove(l.pidFile)
	if stdio.Terminal {
		spec.ConsoleSize = nil
		if stdio.Columns > 0 && stdio.Rows > 0 {
			spec.ConsoleSize = &specs.Box{Width: uint(stdio.Columns), Height: uint(stdio.Rows)}
		}
		if l.socket, err = listenConsole(c.cfg.Dir); err != nil {
			return nil, err
		}
		defer l.socket.Close()
	} else {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		defer null.Close()
		l.io = files{stdio, null}
	}
	defer c.table.Begin()()
	if err := run(ctx, l); err != nil {
		return nil, explain(spec, l.log, err)
	}
	pid, err := runc.ReadPidFile(l.pidFile)
	if err != nil {
		return nil, fmt.Errorf("read pid: %w", err)
	}
	p := &Process{}
	if p.Process, err = c.table.Own(pid); err != nil {
		return nil, err
	}
	if l.socket != nil {
		if p.Console, err = l.socket.receive(stdio.Columns, stdio.Rows); err != nil {
			p.Signal(syscall.SIGKILL) //nolint:errcheck // nobody can talk to it
			return nil, err
		}
	}
	return p, nil
}

// Kill implements Runtime.
func (c *Crun) Kill(_ context.Context, id string, signal syscall.Signal) error {
	if err := c.cgroup(id).Kill(signal); err != nil {
		return fmt.Errorf("signal container %q: %w", id, err)
	}
	return nil
}

// KillRest implements Runtime.
func (c *Crun) KillRest(_ context.Context, id string) error {
	cg := c.cgroup(id)
	if err := errors.Join(cg.Kill(syscall.SIGKILL), cg.WaitEmpty(killTimeout)); err != nil {
		return fmt.Errorf("kill the rest of container %q: %w", id, err)
	}
	return nil
}

// Pids implements Runtime.
func (c *Crun) Pids(_ context.Context, id string) ([]int, error) {
	pids, err := c.cgroup(id).Pids()
	if err != nil {
		return nil, fmt.Errorf("list processes of container %q: %w", id, err)
	}
	return pids, nil
}

// Delete implements Runtime. It goes on after an error, so that as much as
// possible is gone.
func (c *Crun) Delete(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cg := c.cgroup(id)
	errs := []error{cg.Kill(syscall.SIGKILL), cg.WaitEmpty(killTimeout)}
	c.oom.Remove(id)
	log := filepath.Join(c.cfg.Dir, "log", "delete-"+id) // there may be no bundle
	defer os.Remove(log)
	if err := c.command(log).Delete(ctx, id, &runc.DeleteOpts{Force: true}); err != nil {
		errs = append(errs, explain(nil, log, err))
	}
	c.mu.Lock()
	held := c.held[id]
	delete(c.held, id)
	delete(c.inits, id)
	delete(c.devices, id)
	c.mu.Unlock()
	errs = append(errs, cg.Remove(), c.fileSystems.release(held), os.RemoveAll(c.bundle(id)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete container %q: %w", id, err)
	}
	return nil
}

// WatchOOM calls changed, until ctx ends, with the id of a container whose
// processes may have been killed for want of memory: TakeOOM tells.
func (c *Crun) WatchOOM(ctx context.Context, changed func(id string)) error {
	return c.oom.Run(ctx, changed)
}

// TakeOOM tells whether, since the last call for that container, the kernel has
// killed a process of it for want of memory.
func (c *Crun) TakeOOM(id string) bool { return c.oom.Take(id) }

// files gives a command the process's files as its own standard streams, which
// is how an OCI runtime takes them.
type files struct {
	stdio Stdio
	null  *os.File
}

// Set implements runc.IO.
func (f files) Set(cmd *exec.Cmd) {
	pick := func(file *os.File) *os.File {
		if file == nil {
			return f.null
		}
		return file
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = pick(f.stdio.Stdin), pick(f.stdio.Stdout), pick(f.stdio.Stderr)
}

// The rest of runc.IO is for callers that have go-runc make the pipes.

func (files) Close() error          { return nil }
func (files) Stdin() io.WriteCloser { return nil }
func (files) Stdout() io.ReadCloser { return nil }
func (files) Stderr() io.ReadCloser { return nil }
