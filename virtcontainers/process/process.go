// Package process is one process in the guest, as the host knows it: its state, its
// standard streams, and its exit.
package process

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
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

// A Sandbox is what the processes of one have in common.
type Sandbox struct {
	Guest *guest.Guest
	// Spawn runs f in a goroutine for whose end the sandbox's stop waits, after it has
	// ended f's context. It is false once the sandbox is being stopped.
	Spawn func(f func(ctx context.Context)) bool
	// StopTimeout and DrainTimeout are the configuration's.
	StopTimeout, DrainTimeout time.Duration
	Log                       *slog.Logger
}

// Options is what a process is made of.
type Options struct {
	Sandbox *Sandbox
	// Container is the id of its container; Exec is its own, and empty for an init.
	Container, Exec string
	// Spec is of an exec; the guest has an init's from its container.
	Spec  *specs.Process
	Stdio streams.Stdio
	// Holds: it runs nothing, and lives until it is killed or the VM ends.
	Holds bool
	// OnStart is called when an init was started, which took that long.
	OnStart func(took time.Duration)
	// OnExit is called when an init has ended and what it wrote was delivered, before
	// its exit is told; but not where the guest told nothing of that. ooms counts how
	// often the guest has told that its container ran out of memory.
	OnExit func(ooms uint64)
	// OnDelete is called when an exec was deleted.
	OnDelete func()
}

// A Process is a container's init or one exec in it; State tells its life. Its
// methods are safe for concurrent use.
type Process struct {
	opts    Options
	sandbox *Sandbox

	created  time.Time
	expected sync.Once     // for expectExit
	answered chan struct{} // closed when nothing more is waited for from the guest
	killed   chan uint32   // where nothing runs: takes the signal that ends it, capacity 1
	exited   chan struct{}

	mu       sync.Mutex
	state    State
	starting bool
	spec     *specs.Process // execs only
	streams  *streams.Set
	exit     Exit
}

// New returns a process that is created. It owns the streams from here on.
func New(o Options) *Process {
	return &Process{
		opts: o, sandbox: o.Sandbox, spec: o.Spec, state: Created, created: time.Now(),
		answered: make(chan struct{}), killed: make(chan uint32, 1), exited: make(chan struct{}),
	}
}

// State returns where the process is in its life.
func (p *Process) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == Running && p.sandbox.Guest.State() == guest.Paused {
		return Paused
	}
	return p.state
}

// Freeze notes that the process's container was paused, or goes on.
func (p *Process) Freeze(paused bool) error {
	to := Running
	if paused {
		to = Paused
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	next, err := move(p.name(), p.state, to)
	p.state = next
	return err
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
	if p.opts.Exec == "" {
		return fmt.Sprintf("container %q", p.opts.Container)
	}
	return fmt.Sprintf("exec %q of container %q", p.opts.Exec, p.opts.Container)
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
	switch {
	case err == nil && p.opts.Exec == "":
		p.opts.OnStart(time.Since(began))
	case err != nil && p.opts.Exec != "":
		p.setExited(Exit{Status: exitUnknown, At: time.Now()})
		p.CloseStreams()
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
	if p.opts.Holds {
		return nil
	}
	if p.opts.Exec == "" {
		return p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: p.opts.Container})
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
	names, err := p.OpenStreams(ctx, &spec)
	if err != nil {
		return err
	}
	err = p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ExecProcess(ctx, &agentv1.ExecProcessRequest{
			ContainerId: p.opts.Container, ExecId: p.opts.Exec, Process: raw, Streams: names,
		})
		return err
	})
	if err == nil {
		p.Watch()
	}
	return err
}

// OpenStreams connects the process's standard streams to the guest and starts to
// copy them. It returns what the guest is told of them: a terminal has the size that
// the process's spec names.
func (p *Process) OpenStreams(ctx context.Context, spec *specs.Process) (*agentv1.Streams, error) {
	g := p.sandbox.Guest
	ctx, cancel := g.Request(ctx)
	defer cancel()
	st, names, err := streams.Connect(ctx, g.Dial, p.opts.Stdio)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.streams = st
	p.mu.Unlock()
	if names.Terminal && spec.ConsoleSize != nil {
		names.Columns, names.Rows = uint32(spec.ConsoleSize.Width), uint32(spec.ConsoleSize.Height)
	}
	return names, nil
}

func (p *Process) opened() *streams.Set {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams
}

// CloseStreams closes the process's streams, connected or not.
func (p *Process) CloseStreams() {
	p.opened().Close()
	p.opts.Stdio.Close()
}

// Watch begins to wait for the exit of a process that the guest knows, or that runs
// nothing. It is called once.
func (p *Process) Watch() {
	wait := p.awaitExit
	if p.opts.Holds {
		wait = p.hold
	}
	if !p.sandbox.Spawn(wait) {
		p.lose()
	}
}

// awaitExit waits for the guest to tell of the exit, or for the VM's end, then
// for the output, and publishes the exit.
func (p *Process) awaitExit(ctx context.Context) {
	var resp *agentv1.WaitProcessResponse
	a, err := p.sandbox.Guest.Agent()
	if err == nil {
		resp, err = a.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: p.opts.Container, ExecId: p.opts.Exec})
	}
	if err == nil {
		err = resp.Validate()
	}
	if err == nil {
		close(p.answered)
		p.opened().Deliver(resp.StdoutBytes, resp.StderrBytes, p.sandbox.DrainTimeout)
		if p.opts.Exec == "" {
			p.opts.OnExit(resp.OomEvents)
		}
		p.setExited(Exit{Status: resp.ExitStatus, At: between(p.created, time.Unix(0, resp.ExitedAtNs), time.Now())})
		return
	}
	if p.sandbox.Guest.Lost(err) {
		<-p.sandbox.Guest.Dead()
		p.lose()
		return
	}
	// An agent that is ending may have refused.
	grace := time.NewTimer(guest.LostAgentGrace)
	defer grace.Stop()
	select {
	case <-p.sandbox.Guest.Dead():
		p.lose()
		return
	case <-grace.C:
	}
	p.sandbox.Log.Error("wait for a process", "container", p.opts.Container, "exec", p.opts.Exec, "err", refusal.New(err))
	p.end(exitUnknown)
}

// ending are the signals that end a sandbox container.
var ending = []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGABRT}

// hold waits for the end of a process that does not run.
func (p *Process) hold(context.Context) {
	select {
	case <-p.sandbox.Guest.Dead():
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
	p.CloseStreams()
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
	if state == Created && p.opts.Exec != "" {
		return fmt.Errorf("kill %s: it has not been started: %w", p.name(), errdefs.ErrNotFound)
	}
	if p.opts.Holds {
		if slices.Contains(ending, unix.Signal(signal)) {
			select {
			case p.killed <- signal:
			default: // it is ending
			}
		}
		return nil
	}
	final := p.opts.Exec == "" && signal == uint32(unix.SIGKILL)
	if final {
		p.expectExit()
	}
	err := p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.SignalProcess(ctx, &agentv1.SignalProcessRequest{
			ContainerId: p.opts.Container, ExecId: p.opts.Exec, Signal: signal, All: all && p.opts.Exec == "",
		})
		return err
	})
	if final && err != nil && !errdefs.IsNotFound(err) {
		p.sandbox.Log.Warn("the guest did not kill when told", "container", p.opts.Container, "err", err)
		return nil // then it ends with the guest
	}
	if err != nil {
		return refusal.During(err, "kill %s", p.name())
	}
	return nil
}

// patienceRounds is how many times a guest that answers is waited for: a fork bomb takes
// its time to end.
const patienceRounds = 6

// expectExit ends the VM where the guest does not tell in time of the exit of a
// process that was killed: deletion completes, whatever the guest does.
func (p *Process) expectExit() {
	patience := p.sandbox.StopTimeout + p.sandbox.DrainTimeout
	p.expected.Do(func() {
		p.sandbox.Spawn(func(ctx context.Context) {
			why := "the guest hangs"
			for round := 1; ; round++ {
				timer := time.NewTimer(patience)
				select {
				case <-p.answered:
				case <-p.sandbox.Guest.Dead():
				case <-timer.C:
					if round < patienceRounds && p.guestAnswers(ctx, patience) {
						why = "the guest cannot end it"
						continue
					}
					p.sandbox.Guest.Fail(fmt.Errorf("%s did not end within %s of a SIGKILL: %s", p.name(), time.Duration(round)*patience, why))
				}
				timer.Stop()
				return
			}
		})
	})
}

// guestAnswers asks the guest for a sign of life, which has so much time.
func (p *Process) guestAnswers(ctx context.Context, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.OnlineResources(ctx, &agentv1.OnlineResourcesRequest{})
		return err
	}) == nil
}

// Resize sets the size of the process's terminal in character cells.
func (p *Process) Resize(ctx context.Context, columns, rows uint32) error {
	if !p.opts.Stdio.Terminal {
		return fmt.Errorf("resize %s: it has no terminal: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	if p.state == Created && p.opts.Exec != "" && !p.starting {
		// The size is remembered and goes with the start.
		p.spec.ConsoleSize = &specs.Box{Width: uint(columns), Height: uint(rows)}
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	err := p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ResizeTTY(ctx, &agentv1.ResizeTTYRequest{
			ContainerId: p.opts.Container, ExecId: p.opts.Exec, Columns: columns, Rows: rows,
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
	if p.opts.Exec == "" {
		return Exit{}, fmt.Errorf("delete %s: an init is deleted with its container: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	started := p.State() != Created
	exit, err := p.Retire()
	if err != nil {
		return Exit{}, err
	}
	p.opts.OnDelete()
	if started {
		err = p.sandbox.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.RemoveContainer(ctx, &agentv1.RemoveContainerRequest{ContainerId: p.opts.Container, ExecId: p.opts.Exec})
			return err
		})
		if err != nil && !errdefs.IsNotFound(err) && !p.sandbox.Guest.Lost(err) {
			p.sandbox.Log.Warn("forget an exec in the guest", "container", p.opts.Container, "exec", p.opts.Exec, "err", err)
		}
	}
	return exit, nil
}

// Retire moves the process to Deleted and closes its streams.
func (p *Process) Retire() (Exit, error) {
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
	p.CloseStreams()
	return exit, nil
}
