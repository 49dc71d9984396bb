// Package guest is one VM with the agent in it, from the boot to the end: the
// calls, the connections and the events of a sandbox go through it.
package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// LostAgentGrace is how long a VM without its agent may take to end by itself.
const LostAgentGrace = time.Second

// Options is what a guest is made of.
type Options struct {
	Hypervisor hypervisor.Hypervisor
	// Prepare makes what the VM needs on the host, and returns the VM's
	// configuration and, once its time has come, the agent's. Its context ends with
	// the boot's deadline.
	Prepare func(ctx context.Context, g *Guest) (hypervisor.Config, func() *agentv1.ConfigureRequest, error)
	// OnEvent is called for each valid event of the guest, one at a time; it does
	// not block.
	OnEvent func(*agentv1.Event)
	// OnEnd is called when a VM has ended that nobody stopped, before Dead is closed,
	// and returns the cause as it is to be told.
	OnEnd func(cause error) error
	// BootTimeout, RequestTimeout and StopTimeout are the configuration's.
	BootTimeout, RequestTimeout, StopTimeout time.Duration
	// Began is when the work for the guest began.
	Began time.Time
	Log   *slog.Logger
}

// A Guest is one VM with its agent; State tells its life. Its methods are safe for
// concurrent use.
type Guest struct {
	opts Options
	log  *slog.Logger

	booting    context.Context //nolint:containedctx // the lifetime of the boot
	cancelBoot context.CancelCauseFunc
	booted     chan struct{}   // closed when the boot has ended, either way
	dead       chan struct{}   // closed when the VM is gone
	lostAgent  chan struct{}   // closed when the control connection has ended
	closing    context.Context //nolint:containedctx // the lifetime of the guest's own goroutines
	endWatch   context.CancelFunc
	work       sync.WaitGroup // boot, supervise, watchEvents
	closeOnce  sync.Once
	closeErr   error

	mu           sync.Mutex
	state        State
	err          error
	vm           hypervisor.VM
	bootMiB      int // of memory; set before vm
	agent        agentv1.AgentClient
	calls        int           // to the agent that are under way
	idle         chan struct{} // closed when there are none; nil: nobody waits for that
	closeControl func() error  // nil before there is a control connection
}

// New returns a guest that is yet to be booted, so that what depends on it can be made
// before it has anything to tell. Boot and Close are called.
func New(ctx context.Context, o Options) *Guest {
	bootCtx, cancelBoot := context.WithCancelCause(context.WithoutCancel(ctx))
	closing, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	return &Guest{
		opts: o, log: o.Log, booting: bootCtx, cancelBoot: cancelBoot, closing: closing, endWatch: endWatch,
		booted: make(chan struct{}), dead: make(chan struct{}), lostAgent: make(chan struct{}), state: Booting,
	}
}

// Boot begins to boot the guest, once, and returns at once; Await tells the outcome.
func (g *Guest) Boot() { g.work.Go(func() { g.boot(g.booting) }) }

// State returns where the guest is in its life.
func (g *Guest) State() State {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state
}

// PID is the VM monitor's process id on the host, 0 before the boot.
func (g *Guest) PID() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.vm == nil {
		return 0
	}
	return g.vm.PID()
}

// Dead is closed when the VM is gone, of itself or by Close.
func (g *Guest) Dead() <-chan struct{} { return g.dead }

// Err says why the guest failed; nil while it runs and after a mere Close.
func (g *Guest) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// Await waits until the guest is ready and returns why it is not.
func (g *Guest) Await(ctx context.Context) error {
	select {
	case <-g.booted:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.state == Running:
		return nil
	case g.err != nil:
		return g.err
	}
	return g.notRunning()
}

// Fail ends a guest whose VM has ended or is to end for cause. The first cause
// counts.
func (g *Guest) Fail(cause error) {
	g.mu.Lock()
	next, err := move(g.state, Failed)
	if err != nil {
		g.mu.Unlock()
		return
	}
	g.state, g.err = next, cause
	vm := g.vm
	g.mu.Unlock()
	g.log.Error("sandbox failed", "err", cause)
	if vm != nil {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()     // kill at once
		vm.Stop(ctx) //nolint:errcheck // it has ended or is killed; Dead tells
	}
}

// Stop asks the guest to power off and ends the VM, whatever the guest does. The
// guest has until ctx ends, at most the configured time. What the guest had of the
// host is still held; Close gives it back.
func (g *Guest) Stop(ctx context.Context) {
	g.cancelBoot(errors.New("the sandbox is being stopped"))
	<-g.booted
	gctx, cancel := context.WithTimeout(ctx, g.opts.StopTimeout)
	defer cancel()
	// From here on the VM's end is wanted, and there is nothing new to serve.
	g.mu.Lock()
	a, vm, running := g.agent, g.vm, g.state == Running
	g.state = Stopped // allowed from every other state
	g.mu.Unlock()
	if running {
		if _, err := a.Shutdown(gctx, &agentv1.ShutdownRequest{}); err != nil && !g.Lost(err) {
			g.log.Warn("the guest did not shut down when asked", "err", refusal.New(err))
		}
	}
	if vm != nil {
		vm.Stop(gctx) //nolint:errcheck // Close stops it again, and reports
	}
}

// Close gives back what is left of the guest after Stop, and waits for all that
// served it. It is idempotent.
func (g *Guest) Close(ctx context.Context) error {
	g.closeOnce.Do(func() { g.closeErr = g.close(ctx) })
	return g.closeErr
}

func (g *Guest) close(ctx context.Context) error {
	g.cancelBoot(errors.New("the sandbox is being stopped"))
	<-g.booted
	g.mu.Lock()
	g.state = Stopped
	vm, closeControl := g.vm, g.closeControl
	g.mu.Unlock()
	g.endWatch()
	var errs []error
	if closeControl != nil {
		errs = append(errs, closeControl())
	}
	if vm != nil {
		errs = append(errs, vm.Stop(ctx))
	}
	g.work.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop the VM: %w", err)
	}
	return nil
}
