package guest

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// A State is where a guest is in its life.
//
//	from \ to  booting  running  paused  failed  stopped
//	(new)         x
//	booting                x                x       x
//	running                         x       x       x
//	paused                 x                x       x
//	failed                                          x
//
// Paused: the VM stands still, and nobody calls the agent. Failed: the VM could not be
// booted or ended of itself; Close takes back what is left. Stopped is final.
type State int

// The states of a guest.
const (
	Booting State = iota + 1
	Running
	Paused
	Failed
	Stopped
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case Booting:
		return "booting"
	case Running:
		return "running"
	case Paused:
		return "paused"
	case Failed:
		return "failed"
	case Stopped:
		return "stopped"
	}
	return fmt.Sprintf("state %d", int(s))
}

var moves = map[State][]State{
	Booting: {Running, Failed, Stopped},
	Running: {Paused, Failed, Stopped},
	Paused:  {Running, Failed, Stopped},
	Failed:  {Stopped},
}

// move returns to where the table allows it after from, and otherwise a
// FailedPrecondition that names both.
func move(from, to State) (State, error) {
	if slices.Contains(moves[from], to) {
		return to, nil
	}
	return from, fmt.Errorf("the guest is %s and cannot become %s: %w", from, to, errdefs.ErrFailedPrecondition)
}
