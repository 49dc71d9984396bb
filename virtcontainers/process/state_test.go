package process

import (
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// The table of the doc comment, said once more and walked whole.
func TestStates(t *testing.T) {
	all := []State{Created, Running, Paused, Stopped, Deleted}
	allowed := map[State][]State{
		Created: {Running, Stopped, Deleted},
		Running: {Paused, Stopped},
		Paused:  {Running, Stopped},
		Stopped: {Deleted},
	}
	for _, from := range all {
		for _, to := range all {
			got, err := move("it", from, to)
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

func TestAnExitIsBetweenItsProcesssBeginAndNow(t *testing.T) {
	from, to := time.Unix(100, 0), time.Unix(200, 0)
	for at, want := range map[int64]int64{100: 100, 150: 150, 200: 200, 99: 100, -1 << 33: 100, 201: 200, 1 << 33: 200} {
		if got := between(from, time.Unix(at, 0), to); got.Unix() != want {
			t.Errorf("%d became %d, want %d", at, got.Unix(), want)
		}
	}
}
