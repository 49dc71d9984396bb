package lifecycle

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
)

// TestNext holds the transition function against the table in its comment.
func TestNext(t *testing.T) {
	table := map[State]map[Event]State{
		Creating: {Made: Created},
		Created:  {Start: Starting, Exited: Stopped, Remove: Removing},
		Starting: {Started: Running, Failed: Created, Exited: Stopped, Remove: Removing},
		Running:  {Pause: Pausing, Exited: Stopped, Remove: Removing},
		Pausing:  {Frozen: Paused, Thawed: Running, Exited: Stopped, Remove: Removing},
		Paused:   {Resume: Resuming, Exited: Stopped, Remove: Removing},
		Resuming: {Frozen: Paused, Thawed: Running, Exited: Stopped, Remove: Removing},
		Stopped:  {Started: Stopped, Failed: Stopped, Frozen: Stopped, Thawed: Stopped, Remove: Removing},
		Removing: {Started: Removing, Failed: Removing, Frozen: Removing, Thawed: Removing, Exited: Removing, Kept: Stopped},
	}
	for s := Creating; s <= Removing; s++ {
		for e := Made; e <= Kept; e++ {
			want, ok := table[s][e]
			got, err := Next(s, e)
			switch {
			case ok && (err != nil || got != want):
				t.Errorf("%s, %s: got %s, %v; want %s", s, e, got, err, want)
			case !ok && (!errors.Is(err, errdefs.ErrFailedPrecondition) || got != s):
				t.Errorf("%s, %s: got %s, %v; want a refusal", s, e, got, err)
			}
		}
	}
}
