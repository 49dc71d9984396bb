package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/version"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// phases are the times of a boot.
type phases struct {
	began, vmStarted, ready, configured time.Time
	hello                               *agentv1.HelloResponse
}

// boot brings the VM up and publishes the outcome by closing booted.
func (g *Guest) boot(ctx context.Context) {
	defer close(g.booted)
	ph := phases{began: time.Now()}
	err := g.bringUp(ctx, &ph)
	g.mu.Lock()
	if err == nil {
		g.state, err = move(g.state, Running)
	}
	g.mu.Unlock()
	if err != nil {
		g.Fail(fmt.Errorf("boot the VM: %w", err))
		g.mu.Lock()
		vm := g.vm
		g.mu.Unlock()
		if vm == nil {
			close(g.dead) // there is nothing for supervise to see the end of
		}
		return
	}
	guestStart := ph.ready.Add(-time.Duration(ph.hello.AgentReadyUs) * time.Microsecond)
	g.log.Info("sandbox started",
		"shim", ms(ph.began.Sub(g.opts.Began)),
		"vmm", ms(max(0, guestStart.Sub(ph.began))),
		"kernel", ms(time.Duration(ph.hello.AgentStartUs)*time.Microsecond),
		"agent", ms(time.Duration(ph.hello.AgentReadyUs-ph.hello.AgentStartUs)*time.Microsecond),
		"configure", ms(ph.configured.Sub(ph.ready)),
		"took", ms(ph.configured.Sub(g.opts.Began)),
		"guest_kernel", ph.hello.KernelRelease, "guest_agent", ph.hello.Version)
}

func (g *Guest) bringUp(ctx context.Context, ph *phases) error {
	timeout := g.opts.BootTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest's agent did not answer within boot_timeout (%s)", timeout))
	defer cancel()
	cfg, configuration, err := g.opts.Prepare(ctx, g)
	if err != nil {
		return err
	}
	g.bootMiB = cfg.MemoryMiB
	vm, err := g.opts.Hypervisor.Start(ctx, cfg)
	if err != nil {
		return err
	}
	ph.vmStarted = time.Now()
	g.mu.Lock()
	g.vm = vm
	g.mu.Unlock()
	g.work.Go(func() { g.supervise(vm) })

	conn, err := vm.Accept(ctx)
	if err != nil {
		return err
	}
	ph.ready = time.Now()
	client := ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(g.lostAgent) }))
	g.mu.Lock()
	g.closeControl = func() error {
		if err := client.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("close the control connection: %w", err)
		}
		return nil
	}
	g.mu.Unlock()
	agent := agentv1.NewAgentClient(client)
	if ph.hello, err = agent.Hello(ctx, &agentv1.HelloRequest{Version: version.Get().String()}); err == nil {
		err = ph.hello.Validate()
	}
	if err != nil {
		return g.bootCause(ctx, vm, fmt.Errorf("greet the agent: %w", refusal.New(err)))
	}
	if _, err := agent.Configure(ctx, configuration()); err != nil {
		return g.bootCause(ctx, vm, fmt.Errorf("configure the guest: %w", refusal.New(err)))
	}
	ph.configured = time.Now()
	g.mu.Lock()
	g.agent = agent
	g.mu.Unlock()
	g.work.Go(func() { g.watchEvents(agent) })
	return nil
}

// bootCause prefers the reason the VM ended, or the deadline, to the broken call
// that came of it.
func (g *Guest) bootCause(ctx context.Context, vm hypervisor.VM, err error) error {
	if !errors.Is(err, ttrpc.ErrClosed) && ctx.Err() == nil {
		return err
	}
	select {
	case <-vm.Done():
		if vm.Err() != nil {
			return vm.Err()
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return err
}

// supervise sees the end of the VM, or brings it about when the agent is lost,
// and then closes dead.
func (g *Guest) supervise(vm hypervisor.VM) {
	select {
	case <-vm.Done():
	case <-g.lostAgent:
		// A VM that is ending closes the connection first.
		grace := time.NewTimer(LostAgentGrace)
		defer grace.Stop()
		select {
		case <-vm.Done():
		case <-grace.C:
			g.Fail(errors.New("the guest's agent closed its control connection"))
			<-vm.Done()
		}
	}
	if cause := vm.Err(); cause != nil {
		g.Fail(g.opts.OnEnd(cause)) // of no effect where the end was asked for
	}
	close(g.dead)
}

// watchEvents hands on what the guest reports until it ends. What it does not
// understand it reads nonetheless: the control connection is not to fill up.
func (g *Guest) watchEvents(agent agentv1.AgentClient) {
	events, err := agent.WatchEvents(g.closing, &agentv1.WatchEventsRequest{})
	for said := false; err == nil; {
		var e *agentv1.Event
		if e, err = events.Recv(); err != nil {
			break
		}
		if err := e.Validate(); err != nil {
			if !said {
				g.log.Warn("event from the guest", "err", err)
			}
			said = true
			continue
		}
		g.opts.OnEvent(e)
	}
	if g.State() == Running && !g.Lost(err) {
		g.log.Warn("events from the guest have ended", "err", refusal.New(err))
	}
}

// ms rounds a time for a log line.
func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
