package agent

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
)

// TestNext holds the transition function against the table in its comment.
func TestNext(t *testing.T) {
	table := map[state]map[event]state{
		creating: {made: created},
		created:  {start: starting, exited: stopped, remove: removing},
		starting: {started: running, failed: created, exited: stopped, remove: removing},
		running:  {exited: stopped, remove: removing},
		stopped:  {started: stopped, failed: stopped, remove: removing},
		removing: {started: removing, failed: removing, exited: removing, kept: stopped},
	}
	for s := creating; s <= removing; s++ {
		for e := made; e <= kept; e++ {
			want, ok := table[s][e]
			got, err := next(s, e)
			switch {
			case ok && (err != nil || got != want):
				t.Errorf("%s, %s: got %s, %v; want %s", s, e, got, err, want)
			case !ok && (!errors.Is(err, errdefs.ErrFailedPrecondition) || got != s):
				t.Errorf("%s, %s: got %s, %v; want a refusal", s, e, got, err)
			}
		}
	}
}
