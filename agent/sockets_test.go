package agent_test

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/husk-containers/husk/agent"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
)

// A process of the guest connects to a socket; the host hears of it and claims it.
func TestSocketOfTheHost(t *testing.T) {
	dir := t.TempDir()
	port := filepath.Join(dir, "forwards")
	g := newGuestWith(t, func(o *agent.Options) {
		var err error
		if o.Forwards, err = net.Listen("unix", port); err != nil {
			t.Fatal(err)
		}
		o.SocketsDir = filepath.Join(dir, "sockets")
	})
	events, err := g.WatchEvents(g.ctx, &agentv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	listen := &agentv1.ListenSocketRequest{SocketId: "1", Target: agentv1.SocketsDir + "/1", Mode: 0o777}
	for range 2 {
		if _, err := g.ListenSocket(g.ctx, listen); err != nil {
			t.Fatal(err)
		}
	}
	client, err := net.Dial("unix", filepath.Join(dir, "sockets", "1"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	event, err := events.Recv()
	if err != nil || event.GetSocket().GetSocketId() != "1" {
		t.Fatalf("event %v, %v", event, err)
	}
	carrier, err := net.Dial("unix", port)
	if err != nil {
		t.Fatal(err)
	}
	defer carrier.Close()
	target := forward.Target{Network: forward.Accepted, Connection: event.GetSocket().GetConnection()}
	if err := forward.Request(g.ctx, carrier, target); err != nil {
		t.Fatal(err)
	}
	carrier.Write([]byte("\x00\x05hello\x00\x00"))
	if got, err := io.ReadAll(client); string(got) != "hello" || err != nil {
		t.Errorf("the client reads %q, %v", got, err)
	}
	for range 2 {
		if _, err := g.CloseSocket(g.ctx, &agentv1.CloseSocketRequest{SocketId: "1"}); err != nil {
			t.Error(err)
		}
	}
	if _, err := net.Dial("unix", filepath.Join(dir, "sockets", "1")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("the socket is left: %v", err)
	}
}
