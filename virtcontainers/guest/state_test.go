package guest

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

// The table of the doc comment, said once more and walked whole.
func TestStates(t *testing.T) {
	all := []State{Booting, Running, Paused, Failed, Stopped}
	allowed := map[State][]State{
		Booting: {Running, Failed, Stopped},
		Running: {Paused, Failed, Stopped},
		Paused:  {Running, Failed, Stopped},
		Failed:  {Stopped},
	}
	for _, from := range all {
		for _, to := range all {
			got, err := move(from, to)
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
