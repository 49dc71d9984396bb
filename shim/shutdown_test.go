package shim

import (
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
)

// The answer to what ends the shim reaches a client that reads it late, and one
// that stays does not keep the shim.
func TestShutdownIsAnswered(t *testing.T) {
	for range 30 {
		h := newPod(t)
		h.must(h.createPod(), h.startPod())
		if _, err := h.pod.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-h.served:
			t.Fatalf("the shim ended before its client left: %v", err)
		case <-time.After(time.Millisecond):
		}
		h.conn.Close() //nolint:errcheck // it was only read
		h.served <- <-h.served
	}
	h := newPod(t)
	if _, err := h.pod.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-h.served: // with the connection open
		h.served <- err
	case <-time.After(30 * time.Second):
		t.Error("a client that stays keeps the shim")
	}
}

// containerd may die between the start of a shim and CreateSandbox, and then forgets
// the shim.
func TestAShimThatIsNotAskedForASandboxEnds(t *testing.T) {
	short := func(s *Service) { s.patience = 100 * time.Millisecond }
	h := serve(t, Config{ID: "pod", Namespace: "ns", Hold: true}, short)
	select {
	case err := <-h.served:
		h.served <- err
	case <-time.After(30 * time.Second):
		t.Fatal("the shim stays")
	}

	var asked *Service
	h = serve(t, Config{ID: "pod", Namespace: "ns", Hold: true}, func(s *Service) { asked = s })
	h.must(h.createPod())
	asked.giveUp()
	h.must(h.startPod()) // it serves still
}
