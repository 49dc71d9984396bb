package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/husk-containers/husk/agent"
	"github.com/husk-containers/husk/agent/agenttest"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func (g *guest) update(id, resources string) error {
	_, err := g.UpdateContainer(g.ctx, &agentv1.UpdateContainerRequest{ContainerId: id, Resources: []byte(resources)})
	return errgrpc.ToNative(err)
}

func (g *guest) pause(id string) error {
	_, err := g.PauseContainer(g.ctx, &agentv1.PauseContainerRequest{ContainerId: id})
	return errgrpc.ToNative(err)
}

func (g *guest) resume(id string) error {
	_, err := g.ResumeContainer(g.ctx, &agentv1.ResumeContainerRequest{ContainerId: id})
	return errgrpc.ToNative(err)
}

func (g *guest) stats(id string) (*agentv1.StatsContainerResponse, error) {
	s, err := g.StatsContainer(g.ctx, &agentv1.StatsContainerRequest{ContainerId: id})
	if err == nil {
		g.valid(s)
	}
	return s, errgrpc.ToNative(err)
}

func TestUpdateContainer(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, true), "sleep", "1000")
	if err := g.update("c", `{"memory":{"limit":4096}}`); err != nil {
		t.Fatal(err)
	}
	if r := g.runtime.Resources("c"); r == nil || *r.Memory.Limit != 4096 {
		t.Errorf("resources %v", r)
	}
	for resources, class := range map[string]func(error) bool{
		`{"memory":{"limit":1}}`: errdefs.IsFailedPrecondition,
		`{"memory":{"linit":1}}`: errdefs.IsInvalidArgument,
		`{} {}`:                  errdefs.IsInvalidArgument,
		`null x`:                 errdefs.IsInvalidArgument,
	} {
		if err := g.update("c", resources); !class(err) {
			t.Errorf("%s: %v", resources, err)
		}
	}
	if err := g.update("other", `{}`); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

func TestPauseAndResume(t *testing.T) {
	g := newGuest(t)
	refused := func(what string, err error) {
		t.Helper()
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	s := g.open(false, false)
	if err := g.create("c", s, "sh", "-c", "read a; echo on; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	refused("pause before the start", g.pause("c"))
	if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	refused("resume of what runs", g.resume("c"))
	if err := g.pause("c"); err != nil {
		t.Fatal(err)
	}
	refused("second pause", g.pause("c"))
	if err := g.exec("c", "e", g.open(false, false), "true"); !errdefs.IsFailedPrecondition(err) ||
		!strings.Contains(err.Error(), "the container is paused: resume it first") {
		t.Errorf("exec: %v", err)
	}
	if _, err := g.stats("c"); err != nil {
		t.Error(err)
	}
	if err := g.resume("c"); err != nil {
		t.Fatal(err)
	}
	refused("second resume", g.resume("c"))
	if err := g.exec("c", "e", g.open(false, false), "true"); err != nil {
		t.Error(err)
	}
	if err := g.pause("c"); err != nil {
		t.Fatal(err)
	}
	if err := g.signal("c", 9, false); err != nil {
		t.Fatal(err)
	}
	if exit := g.wait("c", ""); exit.GetExitStatus() != 137 {
		t.Errorf("exit %v", exit)
	}
	refused("resume of what has ended", g.resume("c"))
}

func TestPausedContainerIsRemoved(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, true), "sleep", "1000")
	if err := g.pause("c"); err != nil {
		t.Fatal(err)
	}
	if err := g.remove("c", ""); err != nil {
		t.Fatal(err)
	}
	if err := g.resume("c"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// A stuck is a runtime of which the container "stuck" answers nothing.
type stuck struct {
	*agenttest.Runtime
	hold    chan struct{}
	entered chan string
}

func (s stuck) Stats(ctx context.Context, id string) (*agentv1.StatsContainerResponse, error) {
	s.wait(id)
	return s.Runtime.Stats(ctx, id)
}

func (s stuck) wait(id string) {
	if id == "stuck" {
		s.entered <- id
		<-s.hold
	}
}

// Pause fails, as that of a process does which the kernel does not let go.
func (s stuck) Pause(ctx context.Context, id string) error {
	s.wait(id)
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestOneStuckContainerBlocksNoOther(t *testing.T) {
	s := stuck{hold: make(chan struct{}), entered: make(chan string)}
	g := newGuestWith(t, func(o *agent.Options) {
		s.Runtime = o.Runtime.(*agenttest.Runtime)
		o.Runtime = s
	})
	for _, id := range []string{"stuck", "c"} {
		g.start(id, g.open(false, true), "sleep", "1000")
	}
	answered := make(chan error, 2)
	go func() { _, err := g.stats("stuck"); answered <- err }()
	<-s.entered
	go func() { answered <- g.pause("stuck") }()
	<-s.entered
	if stats, err := g.stats("c"); err != nil || stats.GetPids().GetCurrent() != 1 || stats.GetInterfaces()[0].GetTxBytes() != 5 {
		t.Error(stats, err)
	}
	if err := g.exec("c", "e", g.open(false, false), "true"); err != nil {
		t.Error(err)
	}
	if err := g.update("c", `{}`); err != nil {
		t.Error(err)
	}
	close(s.hold)
	g.remove("stuck", "") //nolint:errcheck // it ends the pause below at the latest
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// A pause that does not come to pass leaves a container that runs.
func TestPauseThatFails(t *testing.T) {
	g := newGuestWith(t, func(o *agent.Options) {
		o.Runtime = stuck{Runtime: o.Runtime.(*agenttest.Runtime)}
	})
	g.start("c", g.open(false, true), "sleep", "1000")
	ctx, cancel := context.WithTimeout(g.ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := g.PauseContainer(ctx, &agentv1.PauseContainerRequest{ContainerId: "c"}); err == nil {
		t.Error("paused")
	}
	for { // the agent's end of the call may be later than this one
		err := g.exec("c", "e", g.open(false, false), "true")
		if err == nil {
			break
		}
		if !errdefs.IsFailedPrecondition(err) || g.ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

func TestStatsContainer(t *testing.T) {
	g := newGuest(t)
	for _, id := range []string{"a", "b"} {
		g.start(id, g.open(false, true), "sleep", "1000")
	}
	one, err := g.stats("a")
	if err != nil || one.GetPids().GetCurrent() != 1 {
		t.Error(one, err)
	}
	all, err := g.stats("")
	if err != nil || all.GetPids().GetCurrent() != 2 || len(all.GetInterfaces()) != 1 {
		t.Error(all, err)
	}
	if _, err := g.stats("c"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

func TestOnlineResources(t *testing.T) {
	g := newGuest(t)
	answer, err := g.OnlineResources(g.ctx, &agentv1.OnlineResourcesRequest{Cpus: 3, MemoryBytes: 5 << 30})
	if err != nil || answer.GetCpus() != 3 || answer.GetMemoryBytes() != 5<<30 || answer.GetAvailableBytes() == 0 {
		t.Error(answer, err)
	}
}

// The host learns from the answer how many OOM events came before it.
func TestExitCountsOOMEvents(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, false)
	g.start("c", s, "sh", "-c", "read a; exit 3")
	g.runtime.OOM("c")
	s.stdin.CloseWrite()
	if exit := g.wait("c", ""); exit.GetOomEvents() != 1 {
		t.Error(exit)
	}
}
