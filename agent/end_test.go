package agent_test

import (
	"errors"
	"testing"

	"github.com/containerd/ttrpc"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// An agent that has to end says nothing false of its processes: the host sees a
// lost connection.
func TestEndIsNotAnAnswer(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, false), "sleep", "1000")
	const waiters = 8
	errs := make(chan error, waiters)
	for range waiters {
		go func() {
			_, err := g.WaitProcess(g.ctx, &agentv1.WaitProcessRequest{ContainerId: "c"})
			errs <- err
		}()
		if _, err := g.Hello(g.ctx, &agentv1.HelloRequest{Version: "test"}); err != nil {
			t.Fatal(err)
		}
	}
	why := errors.New("the guest is pulled away")
	g.end(why)
	for range waiters {
		if err := <-errs; !errors.Is(err, ttrpc.ErrClosed) {
			t.Errorf("WaitProcess: %v, want %v", err, ttrpc.ErrClosed)
		}
	}
	if err := g.serveErr(); !errors.Is(err, why) {
		t.Errorf("Serve: %v, want %v", err, why)
	}
}
