package agent_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/husk-containers/husk/agent"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
)

// A listenWatcher reports what it is sent.
type listenWatcher chan *agentv1.ListenEvent

func (w listenWatcher) Run(ctx context.Context, report func(*agentv1.ListenEvent)) error {
	for {
		select {
		case e := <-w:
			report(e)
		case <-ctx.Done():
			return nil
		}
	}
}

func TestListenersAreReportedWhenAskedFor(t *testing.T) {
	w := make(listenWatcher, 1)
	opened := 0
	g := newGuestWith(t, func(o *agent.Options) {
		o.Listeners = func() (agent.ListenWatcher, error) { opened++; return w, nil }
	})
	if _, err := g.Configure(g.ctx, &agentv1.ConfigureRequest{SandboxId: "s", ClockNs: 1, ReportListeners: true}); err != nil {
		t.Fatal(err)
	}
	if opened != 1 {
		t.Errorf("%d watchers", opened)
	}
	stream, err := g.WatchEvents(g.ctx, &agentv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	w <- &agentv1.ListenEvent{Protocol: agentv1.ListenEvent_PROTOCOL_TCP, Address: "0.0.0.0", Port: 80}
	e, err := stream.Recv()
	if err != nil || e.GetListen().GetPort() != 80 || e.GetListen().GetAddress() != "0.0.0.0" {
		t.Errorf("event %v, %v", e, err)
	}
}

func TestListenersAreNotReportedUnasked(t *testing.T) {
	g := newGuestWith(t, func(o *agent.Options) {
		o.Listeners = func() (agent.ListenWatcher, error) { t.Error("opened"); return nil, nil }
	})
	if _, err := g.Configure(g.ctx, &agentv1.ConfigureRequest{SandboxId: "s", ClockNs: 1}); err != nil {
		t.Fatal(err)
	}
}

func TestListenersThatCannotBeReported(t *testing.T) {
	g := newGuest(t)
	_, err := g.Configure(g.ctx, &agentv1.ConfigureRequest{SandboxId: "s", ClockNs: 1, ReportListeners: true})
	if !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("%v, want not implemented", err)
	}
}

func TestFlowsAreForwarded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "forwards")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuestWith(t, func(o *agent.Options) { o.Forwards = ln })
	service, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	target := forward.Target{Network: forward.TCP, Port: uint16(service.Addr().(*net.TCPAddr).Port)}
	if err := forward.Request(g.ctx, conn, target); err != nil {
		t.Error(err)
	}
}
