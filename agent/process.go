package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/agent/lifecycle"
	"github.com/husk-containers/husk/agent/stream"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A guestContainer is a container the host knows of.
type guestContainer struct {
	id string
	// ownPID: it has a PID namespace of its own, of which init is the first
	// process, so that nothing of it outlives that.
	ownPID bool
	init   *process
	execs  map[string]*process // under Agent.mu

	ooms uint64 // OOM events of it that were published; under Agent.mu

	launches launches
	updating sync.Mutex
}

// A process is the first process of a container, or an exec.
type process struct {
	container *guestContainer
	execID    string          // empty: the first
	state     lifecycle.State // under Agent.mu

	// What is below is there from the state created on.
	*container.Process
	streams *stream.Copier
	// done is closed when the process has ended and its output has drained.
	done chan struct{}
	exit *agentv1.WaitProcessResponse // after done
}

// String names a process in errors.
func (p *process) String() string {
	if p.execID == "" {
		return fmt.Sprintf("container %q", p.container.id)
	}
	return fmt.Sprintf("exec %q in container %q", p.execID, p.container.id)
}

// move moves p on. The caller holds Agent.mu.
func (p *process) move(e lifecycle.Event) error {
	s, err := lifecycle.Next(p.state, e)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	p.state = s
	return nil
}

// find returns a process the runtime has made. The caller holds a.mu.
func (a *Agent) find(containerID, execID string) (*process, error) {
	c := a.containers[containerID]
	if c == nil {
		return nil, fmt.Errorf("container %q: %w", containerID, errdefs.ErrNotFound)
	}
	p := c.init
	if execID != "" {
		if p = c.execs[execID]; p == nil {
			return nil, fmt.Errorf("exec %q in container %q: %w", execID, containerID, errdefs.ErrNotFound)
		}
	}
	if p.state == lifecycle.Creating {
		return nil, fmt.Errorf("%s: it is %s: %w", p, p.state, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

func (a *Agent) lookup(containerID, execID string) (*process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.find(containerID, execID)
}

// processes lists all that the runtime has made.
func (a *Agent) processes() []*process {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []*process
	for _, c := range a.containers {
		all = append(all, c.made()...)
	}
	return all
}

// made lists the container's processes but those that are still being made. The
// caller holds Agent.mu.
func (c *guestContainer) made() []*process {
	var all []*process
	if c.init.state != lifecycle.Creating {
		all = append(all, c.init)
	}
	for _, p := range c.execs {
		if p.state != lifecycle.Creating {
			all = append(all, p)
		}
	}
	return all
}

// launch has the runtime make a process, with the streams that the host has
// opened for it, and starts watching it. events are what then happens to it.
func (a *Agent) launch(p *process, s *agentv1.Streams, makeIt func(container.Stdio) (*container.Process, error), events ...lifecycle.Event) error {
	conns, err := a.claims.ClaimAll(s.GetStdin(), s.GetStdout(), s.GetStderr())
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	stdio := container.Stdio{Terminal: s.GetTerminal(), Columns: uint16(s.GetColumns()), Rows: uint16(s.GetRows())}
	var child, local stream.Files
	if !stdio.Terminal {
		if child, local, err = stream.Pipes(conns); err != nil {
			conns.Close()
			return fmt.Errorf("%s: %w", p, err)
		}
		stdio.Stdin, stdio.Stdout, stdio.Stderr = child.Stdin, child.Stdout, child.Stderr
	}
	made, err := makeIt(stdio)
	child.Close()
	if err != nil {
		local.Close()
		conns.Close()
		return err
	}
	if stdio.Terminal {
		local = stream.Files{Stdin: made.Console, Stdout: made.Console}
	}
	p.Process = made
	p.streams = stream.Copy(local, conns, stdio.Terminal)
	p.done = make(chan struct{})
	a.mu.Lock()
	gone := a.containers[p.container.id] != p.container || p.container.init.state == lifecycle.Removing
	for _, e := range events {
		if err == nil {
			err = p.move(e)
		}
	}
	a.mu.Unlock()
	a.watchers.Go(func() { a.watch(p) })
	if gone { // an exec that was late
		p.Signal(syscall.SIGKILL) //nolint:errcheck // it may have ended
		p.streams.Close()
		return fmt.Errorf("%s: the container has been removed: %w", p, errdefs.ErrNotFound)
	}
	return err
}

// watch waits for the process to end and for its output to drain, and then
// tells those who wait. Copying goes on where a descendant has the streams.
// A container ends with its first process: where the kernel does not see to
// that, what is left of it is killed here.
func (a *Agent) watch(p *process) {
	<-p.Done()
	exit := p.Exit()
	if p.execID == "" && !p.container.ownPID {
		err := a.opts.Runtime.KillRest(context.Background(), p.container.id)
		logError(err, "container ended", "container", p.container.id)
	}
	stdout, stderr := p.streams.Drain(stream.Patience)
	a.checkOOM(p.container.id) // the kernel's own event may come late
	a.mu.Lock()
	ooms := p.container.ooms
	a.mu.Unlock()
	p.exit = &agentv1.WaitProcessResponse{
		ExitStatus:  uint32(exit.Status),
		ExitedAtNs:  exit.At.UnixNano(),
		StdoutBytes: stdout,
		StderrBytes: stderr,
		OomEvents:   ooms,
	}
	a.mu.Lock()
	err := p.move(lifecycle.Exited)
	a.mu.Unlock()
	logError(err, "process ended")
	close(p.done)
	slog.Info("process ended", "container", p.container.id, "exec", p.execID, "pid", p.PID(), "status", exit.Status)
}

// wait waits for the end of p.
func (p *process) wait(ctx context.Context) (*agentv1.WaitProcessResponse, error) {
	select {
	case <-p.done:
		return p.exit, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for %s: %w", p, context.Cause(ctx))
	}
}

// logError logs an error that nobody can be told of.
func logError(err error, what string, args ...any) {
	if err != nil {
		slog.Warn(what, append(args, "err", err)...)
	}
}
