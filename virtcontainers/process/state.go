package process

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// A State is where a process is in its life.
//
//	from \ to  created  running  paused  stopped  deleted
//	(new)         x
//	created                x               x        x
//	running                         x      x
//	paused                 x               x
//	stopped                                         x
//
// Paused are an init whose container is, and every process of a sandbox that is. Created to stopped is a kill before the start, a start that failed, or the
// VM's end. Created to deleted is an exec that was never started.
type State int

// The states of a process.
const (
	Created State = iota + 1
	Running
	Paused
	Stopped
	Deleted
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case Created:
		return "created"
	case Running:
		return "running"
	case Paused:
		return "paused"
	case Stopped:
		return "stopped"
	case Deleted:
		return "deleted"
	}
	return fmt.Sprintf("state %d", int(s))
}

var moves = map[State][]State{
	Created: {Running, Stopped, Deleted},
	Running: {Paused, Stopped},
	Paused:  {Running, Stopped},
	Stopped: {Deleted},
}

// move returns to where the table allows it after from, and otherwise a
// FailedPrecondition that names both; what names the process.
func move(what string, from, to State) (State, error) {
	if slices.Contains(moves[from], to) {
		return to, nil
	}
	return from, fmt.Errorf("%s is %s and cannot become %s: %w", what, from, to, errdefs.ErrFailedPrecondition)
}
