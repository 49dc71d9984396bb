package virtcontainers

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/refusal"
	"github.com/husk-containers/husk/virtcontainers/streams"
)

// exitKilled is the status of a process whose VM went away under it: what a
// SIGKILL looks like.
const exitKilled = 128 + uint32(unix.SIGKILL)

// exitUnknown is the status of a process whose end the guest could not tell.
const exitUnknown = 255

// An Exit is how and when a process ended.
type Exit struct {
	// Status is 0..255, 128+n for death by signal n.
	Status uint32
	At     time.Time
}

// A Process is a container's init or one exec in it; ProcessState tells its
// life. Its methods are safe for concurrent use.
type Process struct {
	id        string // exec id; empty for init
	container *Container
	spec      *specs.Process // execs only
	stdio     Stdio

	created  time.Time
	expected sync.Once     // for expectExit
	answered chan struct{} // closed when nothing more is waited for from the guest
	killed   chan uint32   // not nil: nothing runs; takes the signal that ends it, capacity 1
	exited   chan struct{}

	mu       sync.Mutex
	state    ProcessState
	starting bool
	streams  *streams.Set
	exit     Exit
}

func newProcess(c *Container, id string, spec *specs.Process, stdio Stdio) *Process {
	return &Process{
		id: id, container: c, spec: spec, stdio: stdio, state: Created,
		created: time.Now(), answered: make(chan struct{}), exited: make(chan struct{}),
	}
}

// State returns where the process is in its life.
func (p *Process) State() ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// Exited is closed once the process has exited and what it wrote has been
// delivered.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Exit returns how the process ended; it is zero before Exited is closed.
func (p *Process) Exit() Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

func (p *Process) name() string {
	if p.id == "" {
		return fmt.Sprintf("container %q", p.container.id)
	}
	return fmt.Sprintf("exec %q of container %q", p.id, p.container.id)
}

// Start runs the process: the container's own command for an init, the exec's
// otherwise. It is FailedPrecondition on a process that was started before. An
// exec that cannot be started has exited.
func (p *Process) Start(ctx context.Context) error {
	p.mu.Lock()
	if p.state != Created || p.starting {
		defer p.mu.Unlock()
		return fmt.Errorf("start %s: it is %s: %w", p.name(), p.state, errdefs.ErrFailedPrecondition)
	}
	p.starting = true
	p.mu.Unlock()

	began := time.Now()
	err := p.start(ctx)
	if err == nil && p.id == "" {
		p.container.sandbox.log.Info("container started", "container", p.container.id,
			"create", ms(p.container.created), "start", ms(time.Since(began)))
	}

	if err != nil && p.id != "" {
		p.setExited(Exit{Status: exitUnknown, At: time.Now()})
		p.closeStreams()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starting = false
	if err != nil {
		return refusal.During(err, "start %s", p.name())
	}
	if p.state == Created { // it may have exited already
		p.state, _ = move(p.name(), p.state, Running)
	}
	return nil
}

func (p *Process) start(ctx context.Context) error {
	s := p.container.sandbox
	if p.killed != nil {
		return nil
	}
	if p.id == "" {
		return s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: p.container.id})
			return err
		})
	}
	p.mu.Lock()
	spec := *p.spec // Resize may have changed it
	p.mu.Unlock()
	raw, err := json.Marshal(&spec)
	if err != nil {
		return err
	}
	names, err := p.openStreams(ctx)
	if err != nil {
		return err
	}
	setSize(names, &spec)
	err = s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ExecProcess(ctx, &agentv1.ExecProcessRequest{
			ContainerId: p.container.id, ExecId: p.id, Process: raw, Streams: names,
		})
		return err
	})
	if err == nil {
		s.watch(p)
	}
	return err
}

// setSize gives a terminal the size that the process's spec names.
func setSize(names *agentv1.Streams, p *specs.Process) {
	if names.Terminal && p.ConsoleSize != nil {
		names.Columns, names.Rows = uint32(p.ConsoleSize.Width), uint32(p.ConsoleSize.Height)
	}
}

// openStreams connects the process's standard streams to the guest and starts to
// copy them.
func (p *Process) openStreams(ctx context.Context) (*agentv1.Streams, error) {
	g := p.container.sandbox.guest
	ctx, cancel := g.Request(ctx)
	defer cancel()
	st, names, err := streams.Connect(ctx, g.Dial, p.stdio)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.streams = st
	p.mu.Unlock()
	return names, nil
}

func (p *Process) opened() *streams.Set {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams
}

// closeStreams closes the process's streams, connected or not.
func (p *Process) closeStreams() {
	p.opened().Close()
	p.stdio.Close()
}

// awaitExit waits for the guest to tell of the exit, or for the VM's end, then
// for the output, and publishes the exit.
func (p *Process) awaitExit(ctx context.Context) {
	s := p.container.sandbox
	var resp *agentv1.WaitProcessResponse
	a, err := s.guest.Agent()
	if err == nil {
		resp, err = a.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: p.container.id, ExecId: p.id})
	}
	if err == nil {
		err = resp.Validate()
	}
	if err == nil {
		close(p.answered)
		p.opened().Deliver(resp.StdoutBytes, resp.StderrBytes, s.config.Runtime.DrainTimeout.Duration)
		if p.id == "" {
			p.container.report()
		}
		p.setExited(Exit{Status: resp.ExitStatus, At: between(p.created, time.Unix(0, resp.ExitedAtNs), time.Now())})
		return
	}
	if s.guest.Lost(err) {
		<-s.guest.Dead()
		p.lose()
		return
	}
	// An agent that is ending may have refused.
	grace := time.NewTimer(guest.LostAgentGrace)
	defer grace.Stop()
	select {
	case <-s.guest.Dead():
		p.lose()
		return
	case <-grace.C:
	}
	s.log.Error("wait for a process", "container", p.container.id, "exec", p.id, "err", refusal.New(err))
	p.end(exitUnknown)
}

// ending are the signals that end a sandbox container.
var ending = []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGABRT}

// hold waits for the end of a process that does not run.
func (p *Process) hold() {
	select {
	case <-p.container.sandbox.guest.Dead():
		p.lose()
	case signal := <-p.killed:
		p.end(128 + signal)
	}
}

// lose ends a process whose VM is gone.
func (p *Process) lose() { p.end(exitKilled) }

// end ends a process of which the guest will tell nothing more.
func (p *Process) end(status uint32) {
	close(p.answered)
	p.closeStreams()
	p.setExited(Exit{Status: status, At: time.Now()})
}

// between returns t, or the bound that it is beyond: the guest's clock is not to
// be relied on.
func between(from, t, to time.Time) time.Time {
	switch {
	case t.Before(from):
		return from
	case t.After(to):
		return to
	}
	return t
}

func (p *Process) setExited(e Exit) {
	p.mu.Lock()
	next, err := move(p.name(), p.state, Stopped)
	if err == nil {
		p.state, p.exit = next, e
	}
	st := p.streams
	p.mu.Unlock()
	if err != nil {
		return // it had exited
	}
	st.StopStdin()
	close(p.exited)
}

// Kill sends signal to the process, or with all to every process of the
// container. It is NotFound once the process has exited. A guest that does not tell
// in time of the end of a container after a SIGKILL is ended itself, whatever it
// answers here.
func (p *Process) Kill(ctx context.Context, signal uint32, all bool) error {
	p.mu.Lock()
	state := p.state
	p.mu.Unlock()
	if state == Stopped || state == Deleted {
		return fmt.Errorf("kill %s: process already finished: %w", p.name(), errdefs.ErrNotFound)
	}
	if state == Created && p.id != "" {
		return fmt.Errorf("kill %s: it has not been started: %w", p.name(), errdefs.ErrNotFound)
	}
	s := p.container.sandbox
	if p.killed != nil {
		if slices.Contains(ending, unix.Signal(signal)) {
			select {
			case p.killed <- signal:
			default: // it is ending
			}
		}
		return nil
	}
	final := p.id == "" && signal == uint32(unix.SIGKILL)
	if final {
		s.expectExit(p)
	}
	err := s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.SignalProcess(ctx, &agentv1.SignalProcessRequest{
			ContainerId: p.container.id, ExecId: p.id, Signal: signal, All: all && p.id == "",
		})
		return err
	})
	if final && err != nil && !errdefs.IsNotFound(err) {
		s.log.Warn("the guest did not kill when told", "container", p.container.id, "err", err)
		return nil // then it ends with the guest
	}
	if err != nil {
		return refusal.During(err, "kill %s", p.name())
	}
	return nil
}

// Resize sets the size of the process's terminal in character cells.
func (p *Process) Resize(ctx context.Context, columns, rows uint32) error {
	if !p.stdio.Terminal {
		return fmt.Errorf("resize %s: it has no terminal: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	if p.state == Created && p.id != "" && !p.starting {
		// The size is remembered and goes with the start.
		p.spec.ConsoleSize = &specs.Box{Width: uint(columns), Height: uint(rows)}
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	err := p.container.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ResizeTTY(ctx, &agentv1.ResizeTTYRequest{
			ContainerId: p.container.id, ExecId: p.id, Columns: columns, Rows: rows,
		})
		return err
	})
	if err != nil {
		return refusal.During(err, "resize %s", p.name())
	}
	return nil
}

// Delete forgets an exec. It is FailedPrecondition while the process runs, and
// for an init, which goes with its container.
func (p *Process) Delete(ctx context.Context) (Exit, error) {
	if p.id == "" {
		return Exit{}, fmt.Errorf("delete %s: an init is deleted with its container: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	started := p.State() != Created
	exit, err := p.retire()
	if err != nil {
		return Exit{}, err
	}
	p.container.forget(p.id)
	if started {
		err = p.container.sandbox.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.RemoveContainer(ctx, &agentv1.RemoveContainerRequest{ContainerId: p.container.id, ExecId: p.id})
			return err
		})
		if err != nil && !errdefs.IsNotFound(err) && !p.container.sandbox.guest.Lost(err) {
			p.container.sandbox.log.Warn("forget an exec in the guest", "container", p.container.id, "exec", p.id, "err", err)
		}
	}
	return exit, nil
}

// retire moves the process to Deleted and closes its streams.
func (p *Process) retire() (Exit, error) {
	p.mu.Lock()
	next, err := move(p.name(), p.state, Deleted)
	if err == nil && p.starting {
		err = fmt.Errorf("%s is being started: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		p.mu.Unlock()
		return Exit{}, fmt.Errorf("delete: %w", err)
	}
	p.state = next
	exit := p.exit
	p.mu.Unlock()
	p.closeStreams()
	return exit, nil
}
