package virtcontainers

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/version"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/refusal"
	"github.com/husk-containers/husk/virtcontainers/spec"
)

// shareTag is the virtio-fs tag of the directory that holds the containers' file
// systems.
const shareTag = "husk"

// entropyBytes are given to the guest's random pool at boot.
const entropyBytes = 256

// phases are the times of a boot.
type phases struct {
	began, vmStarted, ready, configured time.Time
	hello                               *agentv1.HelloResponse
}

// boot brings the VM up and publishes the outcome by closing booted.
func (s *Sandbox) boot(ctx context.Context) {
	defer close(s.booted)
	ph := phases{began: time.Now()}
	err := s.bringUp(ctx, &ph)
	s.mu.Lock()
	if err == nil {
		s.state, err = move(sandboxMoves, "sandbox", s.state, SandboxRunning)
	}
	s.mu.Unlock()
	if err != nil {
		s.fail(fmt.Errorf("boot the VM: %w", err))
		s.mu.Lock()
		vm := s.vm
		s.mu.Unlock()
		if vm == nil {
			close(s.dead) // there is nothing for supervise to see the end of
		}
		return
	}
	guestStart := ph.ready.Add(-time.Duration(ph.hello.AgentReadyUs) * time.Microsecond)
	s.log.Info("sandbox started",
		"shim", ms(ph.began.Sub(s.began)),
		"vmm", ms(max(0, guestStart.Sub(ph.began))),
		"kernel", ms(time.Duration(ph.hello.AgentStartUs)*time.Microsecond),
		"agent", ms(time.Duration(ph.hello.AgentReadyUs-ph.hello.AgentStartUs)*time.Microsecond),
		"configure", ms(ph.configured.Sub(ph.ready)),
		"took", ms(ph.configured.Sub(s.began)),
		"guest_kernel", ph.hello.KernelRelease, "guest_agent", ph.hello.Version)
}

func (s *Sandbox) bringUp(ctx context.Context, ph *phases) error {
	timeout := s.config.Runtime.BootTimeout.Duration
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the guest's agent did not answer within boot_timeout (%s)", timeout))
	defer cancel()
	vm, err := s.hv.Start(ctx, hypervisor.Config{
		ID:           s.id,
		Dir:          s.dir,
		VCPUs:        s.config.Hypervisor.DefaultVCPUs,
		MemoryMiB:    s.config.Hypervisor.DefaultMemoryMiB,
		Kernel:       s.config.Guest.Kernel,
		Initrd:       s.config.Guest.Initrd,
		KernelParams: "husk.log=" + string(s.config.Guest.LogLevel) + " " + s.config.Guest.KernelParams,
		Devices:      []hypervisor.Device{hypervisor.Share{Tag: shareTag, Dir: s.shareDir()}},
		Started:      func(p hypervisor.Process) error { return s.record.Add(p.Name, p.PID) },
	})
	if err != nil {
		return err
	}
	ph.vmStarted = time.Now()
	s.undo.Push("stop the VM", hostStep, vm.Stop)
	s.mu.Lock()
	s.vm = vm
	s.mu.Unlock()
	s.spawn(func() { s.supervise(vm) })

	conn, err := vm.Accept(ctx)
	if err != nil {
		return err
	}
	ph.ready = time.Now()
	client := ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(s.lostAgent) }))
	s.undo.Push("close the control connection", hostStep, func(context.Context) error {
		if err := client.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	agent := agentv1.NewAgentClient(client)
	if ph.hello, err = agent.Hello(ctx, &agentv1.HelloRequest{Version: version.Get().String()}); err == nil {
		err = ph.hello.Validate()
	}
	if err != nil {
		return s.bootCause(ctx, vm, fmt.Errorf("greet the agent: %w", refusal.New(err)))
	}
	if _, err := agent.Configure(ctx, s.configuration()); err != nil {
		return s.bootCause(ctx, vm, fmt.Errorf("configure the guest: %w", refusal.New(err)))
	}
	ph.configured = time.Now()
	s.mu.Lock()
	s.agent = agent
	s.mu.Unlock()
	s.spawn(func() { s.watchEvents(agent) })
	return nil
}

// bootCause prefers the reason the VM ended, or the deadline, to the broken call
// that came of it.
func (s *Sandbox) bootCause(ctx context.Context, vm hypervisor.VM, err error) error {
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

func (s *Sandbox) configuration() *agentv1.ConfigureRequest {
	entropy := make([]byte, entropyBytes)
	rand.Read(entropy) //nolint:errcheck // never fails since Go 1.24
	req := &agentv1.ConfigureRequest{
		SandboxId: s.id,
		Hostname:  s.hostname,
		ClockNs:   time.Now().UnixNano(),
		Entropy:   entropy,
		Storages: []*agentv1.Storage{{
			Kind: agentv1.Storage_KIND_VIRTIOFS, Source: shareTag, Target: spec.GuestShare,
		}},
	}
	for k, v := range s.sysctls {
		req.Sysctls = append(req.Sysctls, &agentv1.Sysctl{Key: k, Value: v})
	}
	return req
}

// supervise sees the end of the VM, or brings it about when the agent is lost,
// and then closes dead.
func (s *Sandbox) supervise(vm hypervisor.VM) {
	select {
	case <-vm.Done():
	case <-s.lostAgent:
		// A VM that is ending closes the connection first.
		grace := time.NewTimer(lostAgentGrace)
		defer grace.Stop()
		select {
		case <-vm.Done():
		case <-grace.C:
			s.fail(errors.New("the guest's agent closed its control connection"))
			<-vm.Done()
		}
	}
	if cause := vm.Err(); cause != nil {
		s.fail(cause) // of no effect where the end was asked for
	}
	close(s.dead)
}

// lostAgentGrace is how long a VM without its agent may take to end by itself.
const lostAgentGrace = time.Second

// oomPause is how long a container's next OOM is not told of: a guest in distress,
// or a hostile one, reports without end.
const oomPause = time.Second

// watchEvents hands on what the guest reports, as far as it is about containers
// that the host knows, until the guest ends. What it does not understand it reads
// nonetheless: the control connection is not to fill up.
func (s *Sandbox) watchEvents(agent agentv1.AgentClient) {
	events, err := agent.WatchEvents(s.watchCtx, &agentv1.WatchEventsRequest{})
	for said := false; err == nil; {
		var e *agentv1.Event
		if e, err = events.Recv(); err != nil {
			break
		}
		if err := e.Validate(); err != nil {
			if !said {
				s.log.Warn("event from the guest", "err", err)
			}
			said = true
			continue
		}
		c, unknown := s.Container(e.GetOom().GetContainerId())
		if unknown != nil || time.Since(c.oomAt) < oomPause {
			continue
		}
		c.oomAt = time.Now()
		select {
		case s.ooms <- c.id:
		default: // a burst says no more than its first
		}
	}
	if s.State() == SandboxRunning && !s.lost(err) {
		s.log.Warn("events from the guest have ended", "err", refusal.New(err))
	}
}
