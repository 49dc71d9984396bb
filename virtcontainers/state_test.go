package virtcontainers

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

// The tables of the doc comments, said once more and walked whole.
func TestStateTables(t *testing.T) {
	walk(t, processMoves, []ProcessState{Created, Running, Stopped, Deleted}, map[ProcessState][]ProcessState{
		Created: {Running, Stopped, Deleted},
		Running: {Stopped},
		Stopped: {Deleted},
	})
	walk(t, sandboxMoves, []SandboxState{SandboxBooting, SandboxRunning, SandboxFailed, SandboxStopped}, map[SandboxState][]SandboxState{
		SandboxBooting: {SandboxRunning, SandboxFailed, SandboxStopped},
		SandboxRunning: {SandboxFailed, SandboxStopped},
		SandboxFailed:  {SandboxStopped},
	})
}

func walk[S interface {
	comparable
	String() string
}](t *testing.T, table map[S][]S, all []S, allowed map[S][]S,
) {
	t.Helper()
	for _, from := range all {
		for _, to := range all {
			got, err := move(table, "it", from, to)
			if slices.Contains(allowed[from], to) {
				if err != nil || got != to {
					t.Errorf("%s to %s: %s, %v", from, to, got, err)
				}
			} else if !errdefs.IsFailedPrecondition(err) || got != from {
				t.Errorf("%s to %s: %s, %v; want FailedPrecondition", from, to, got, err)
			}
		}
	}
}
