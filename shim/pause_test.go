package shim

import (
	"slices"
	"testing"

	api "github.com/containerd/containerd/api/runtime/task/v3"
)

// A SIGKILL of a pod's container has a sandbox that is paused go on, and whoever
// watches hears of it where a task stands for the sandbox.
func TestSIGKILLWakesASandbox(t *testing.T) {
	for _, byTask := range []bool{true, false} {
		h := newHarness(t)
		want := []string{"create c", "start c"}
		if byTask {
			h.bundle = h.newBundle(`"io.kubernetes.cri.container-type":"sandbox"`)
			want = append(want, "paused c", "resumed c")
		}
		h.run("c")
		if byTask {
			if _, err := h.Pause(t.Context(), &api.PauseRequest{ID: "c"}); err != nil {
				t.Fatal(err)
			}
		}
		h.sandbox.paused.Store(true)
		if _, err := h.Kill(t.Context(), &api.KillRequest{ID: "c", Signal: 9}); err != nil {
			t.Fatal(err)
		}
		if h.sandbox.paused.Load() && !byTask {
			t.Error("the sandbox is paused still")
		}
		if got := h.journal.Words(); !slices.Equal(got[:len(want)], want) {
			t.Errorf("told %q, want %q at first", got, want)
		}
	}
}
