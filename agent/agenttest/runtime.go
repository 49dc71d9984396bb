// Package agenttest runs an agent without a guest, for tests of all that stands
// above it: its Runtime runs containers as plain processes of the host, without
// root, and its Platform only remembers.
package agenttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/reap"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Runtime is a container.Runtime whose containers are plain processes: args,
// env, cwd, standard streams, terminals, signals and exit codes are the spec's,
// and nothing else of it is heeded. A process runs in the root file system's
// directory, without a chroot: its command is the host's. It fails as crun does.
type Runtime struct {
	root  func(guestPath string) string
	table *reap.Table

	mu         sync.Mutex
	containers map[string]*hostContainer
	killed     map[string]bool // ids TakeOOM tells of
	oom        chan string
}

type hostContainer struct {
	dir       string // on the host
	gate      *os.File
	processes []*reap.Process
	resources *specs.LinuxResources // of the last update
}

var _ container.Runtime = (*Runtime)(nil)

// NewRuntime returns a Runtime. root maps the root.path of a spec, a guest path,
// to a directory of the host; see ShareRoot.
func NewRuntime(root func(guestPath string) string) *Runtime {
	return &Runtime{
		root:       root,
		table:      reap.New(),
		containers: make(map[string]*hostContainer),
		killed:     make(map[string]bool),
		oom:        make(chan string),
	}
}

// Create implements container.Runtime. The process is a shell that waits for
// Start and then becomes the command.
func (r *Runtime) Create(_ context.Context, id string, spec *specs.Spec, _ []string, stdio container.Stdio) (*container.Process, error) {
	fail := func(err error) (*container.Process, error) {
		return nil, fmt.Errorf("create container %q: %w", id, err)
	}
	dir := r.root(spec.Root.Path)
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return fail(fmt.Errorf("root file system %q: no such directory in the guest: %w", spec.Root.Path, errdefs.ErrNotFound))
	}
	if target, err := r.target(spec); err != nil {
		return fail(fmt.Errorf("PID namespace of container %q: %w", target, err))
	}
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer gateR.Close()
	c := &hostContainer{dir: dir, gate: gateW}
	if !r.add(id, c) {
		gateW.Close()
		return fail(errdefs.ErrAlreadyExists)
	}
	p, err := r.run(c, spec.Process, stdio, gateR)
	if err != nil {
		r.take(id)
		gateW.Close()
		return fail(err)
	}
	return p, nil
}

// target is the container whose PID namespace the spec names, empty for none;
// NotFound where its first process has ended.
func (r *Runtime) target(spec *specs.Spec) (string, error) {
	for _, ns := range spec.Linux.Namespaces {
		id, ok := agentv1.ContainerOfPID(ns.Path)
		if !ok {
			continue
		}
		c, err := r.get(id)
		if err != nil {
			return id, err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(c.processes) == 0 || c.processes[0].Signal(0) != nil {
			return id, fmt.Errorf("the container has ended: %w", errdefs.ErrNotFound)
		}
		return id, nil
	}
	return "", nil
}

func (r *Runtime) add(id string, c *hostContainer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.containers[id] != nil {
		return false
	}
	r.containers[id] = c
	return true
}

func (r *Runtime) take(id string) *hostContainer {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	delete(r.containers, id)
	return c
}

func (r *Runtime) get(id string) (*hostContainer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// Hold implements container.Runtime: there is nothing to hold.
func (r *Runtime) Hold(_ context.Context, id string, _ []string) error {
	_, err := r.get(id)
	return err
}

// Start implements container.Runtime.
func (r *Runtime) Start(_ context.Context, id string) error {
	c, err := r.get(id)
	if err != nil {
		return err
	}
	return c.gate.Close()
}

// Exec implements container.Runtime.
func (r *Runtime) Exec(_ context.Context, id, execID string, process *specs.Process, stdio container.Stdio) (*container.Process, error) {
	c, err := r.get(id)
	if err != nil {
		return nil, err
	}
	p, err := r.run(c, process, stdio, nil)
	if err != nil {
		return nil, fmt.Errorf("exec %q in container %q: %w", execID, id, err)
	}
	return p, nil
}

// run starts a process, in a process group of its own. With a gate it waits
// until that is closed.
func (r *Runtime) run(c *hostContainer, spec *specs.Process, stdio container.Stdio, gate *os.File) (*container.Process, error) {
	command, err := lookPath(spec)
	if err != nil {
		return nil, err
	}
	cwd := filepath.Join(c.dir, spec.Cwd)
	if info, err := os.Stat(cwd); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("working directory %q: no such directory: check cwd: %w", spec.Cwd, errdefs.ErrInvalidArgument)
	}
	cmd := exec.Command(command)
	cmd.Args = spec.Args
	if gate != nil {
		cmd = exec.Command("/bin/sh", append([]string{"-c", `read _ <&3; exec 3<&-; exec "$@"`, "sh", command}, spec.Args[1:]...)...)
		cmd.ExtraFiles = []*os.File{gate}
	}
	cmd.Env = append([]string{}, spec.Env...)
	cmd.Dir = cwd
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p := &container.Process{}
	if stdio.Terminal {
		console, terminal, err := openPTY()
		if err != nil {
			return nil, err
		}
		defer terminal.Close()
		p.Console = console
		if stdio.Columns > 0 && stdio.Rows > 0 {
			err = container.Resize(console, stdio.Columns, stdio.Rows)
		}
		if err != nil {
			console.Close()
			return nil, err
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	} else {
		setFiles(cmd, stdio)
	}
	if p.Process, err = r.table.Start(cmd); err != nil {
		if p.Console != nil {
			p.Console.Close()
		}
		return nil, err
	}
	r.mu.Lock()
	c.processes = append(c.processes, p.Process)
	r.mu.Unlock()
	return p, nil
}

// setFiles leaves nil what is not there: a nil *os.File in an interface is not.
func setFiles(cmd *exec.Cmd, stdio container.Stdio) {
	if stdio.Stdin != nil {
		cmd.Stdin = stdio.Stdin
	}
	if stdio.Stdout != nil {
		cmd.Stdout = stdio.Stdout
	}
	if stdio.Stderr != nil {
		cmd.Stderr = stdio.Stderr
	}
}

// lookPath finds the command as crun does, and fails as it does.
func lookPath(spec *specs.Process) (string, error) {
	name := spec.Args[0]
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = nil
		for _, env := range spec.Env {
			if path, ok := strings.CutPrefix(env, "PATH="); ok {
				for _, dir := range filepath.SplitList(path) {
					candidates = append(candidates, filepath.Join(dir, name))
				}
			}
		}
	}
	for _, file := range candidates {
		info, err := os.Stat(file)
		switch {
		case err != nil:
			continue
		case info.IsDir() || info.Mode()&0o111 == 0:
			return "", fmt.Errorf("%q: not executable (permission denied): check the command, and the mode of its file: %w", name, errdefs.ErrPermissionDenied)
		}
		return file, nil
	}
	return "", fmt.Errorf("%q: executable file not found in $PATH: check the command, and PATH of the image: %w", name, errdefs.ErrNotFound)
}

// Kill implements container.Runtime.
func (r *Runtime) Kill(_ context.Context, id string, signal syscall.Signal) error {
	c, err := r.get(id)
	if err != nil {
		return nil //nolint:nilerr // as an empty cgroup
	}
	return r.kill(c, signal)
}

// KillRest implements container.Runtime, but for the wait: what is left is not
// this process's to wait for.
func (r *Runtime) KillRest(ctx context.Context, id string) error {
	return r.Kill(ctx, id, syscall.SIGKILL)
}

// kill signals the process group of each process that has not ended. What a
// process that has ended leaves in its group is killed as long as the group is
// there, for its number is then not given to another.
func (r *Runtime) kill(c *hostContainer, signal syscall.Signal) error {
	r.mu.Lock()
	processes := append([]*reap.Process{}, c.processes...)
	r.mu.Unlock()
	var errs []error
	for _, p := range processes {
		if err := syscall.Kill(-p.PID(), signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("signal process group %d: %w", p.PID(), err))
		}
	}
	return errors.Join(errs...)
}

// Pids implements container.Runtime.
func (r *Runtime) Pids(_ context.Context, id string) ([]int, error) {
	c, err := r.get(id)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	groups := make(map[int]bool)
	for _, p := range c.processes {
		groups[p.PID()] = true
	}
	r.mu.Unlock()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, stat := range stats {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue // gone meanwhile
		}
		// "pid (comm) state ppid pgrp ...", and comm may hold anything
		fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		group, err := strconv.Atoi(string(fields[2]))
		if err != nil || !groups[group] || fields[0][0] == 'Z' {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Delete implements container.Runtime.
func (r *Runtime) Delete(ctx context.Context, id string) error {
	c := r.take(id)
	if c == nil {
		return nil
	}
	c.gate.Close() // Start has, as a rule
	if err := r.kill(c, syscall.SIGKILL); err != nil {
		return err
	}
	for _, p := range c.processes {
		select {
		case <-p.Done():
		case <-ctx.Done():
			return fmt.Errorf("delete container %q: %w", id, context.Cause(ctx))
		}
	}
	return nil
}

// OOM acts as if the kernel had killed a process of the container for want of
// memory. An agent must be serving.
func (r *Runtime) OOM(id string) {
	r.mu.Lock()
	r.killed[id] = true
	r.mu.Unlock()
	r.oom <- id
}

// WatchOOM tells of calls of OOM, as container.Crun does of the kernel's.
func (r *Runtime) WatchOOM(ctx context.Context, changed func(id string)) error {
	for {
		select {
		case id := <-r.oom:
			changed(id)
		case <-ctx.Done():
			return nil
		}
	}
}

// TakeOOM tells whether OOM was called since the last time.
func (r *Runtime) TakeOOM(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	killed := r.killed[id]
	delete(r.killed, id)
	return killed
}

// ShareRoot returns a map for NewRuntime: the guest's mount of the share to the
// directory that the host shares.
func ShareRoot(dir string) func(string) string {
	return func(guestPath string) string {
		if rest, ok := strings.CutPrefix(guestPath, agentv1.GuestDir+"/share/"); ok {
			return filepath.Join(dir, rest)
		}
		return guestPath
	}
}
