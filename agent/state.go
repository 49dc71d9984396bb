package agent

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A state is where a process, a container's first or an exec, stands. A
// container is in the state of its first process.
//
//	             made      start     started  failed   exited    remove    kept
//	creating     created
//	created                starting                    stopped   removing
//	starting                         running  created  stopped   removing
//	running                                            stopped   removing
//	stopped                          stopped  stopped            removing
//	removing                         removing removing removing            stopped
//
// An exec goes from creating by way of created and starting to running in one
// step. The initial state is creating; the end of removing is that nobody knows
// the process any more. Where there is no entry the event is refused.
type state uint8

const (
	creating state = iota + 1
	created
	starting
	running
	stopped
	removing
)

func (s state) String() string {
	switch s {
	case creating:
		return "being created"
	case created:
		return "created"
	case starting:
		return "being started"
	case running:
		return "running"
	case stopped:
		return "stopped"
	case removing:
		return "being removed"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// An event is what happens to a process.
type event uint8

const (
	made    event = iota + 1 // the runtime has made it
	start                    // the host wants it started
	started                  // the runtime has started it
	failed                   // the runtime could not start it
	exited                   // it has ended
	remove                   // the host wants it gone
	kept                     // it could not be removed
)

func (e event) String() string {
	switch e {
	case made:
		return "made"
	case start:
		return "start"
	case started:
		return "started"
	case failed:
		return "failed"
	case exited:
		return "exited"
	case remove:
		return "remove"
	case kept:
		return "kept"
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// next is the transition function. A refusal is FailedPrecondition.
func next(s state, e event) (state, error) {
	switch s {
	case creating:
		if e == made {
			return created, nil
		}
	case created:
		switch e {
		case start:
			return starting, nil
		case exited:
			return stopped, nil
		case remove:
			return removing, nil
		}
	case starting:
		switch e {
		case started:
			return running, nil
		case failed:
			return created, nil
		case exited:
			return stopped, nil
		case remove:
			return removing, nil
		}
	case running:
		switch e {
		case exited:
			return stopped, nil
		case remove:
			return removing, nil
		}
	case stopped:
		switch e {
		case started, failed:
			return stopped, nil
		case remove:
			return removing, nil
		}
	case removing:
		switch e {
		case started, failed, exited:
			return removing, nil
		case kept:
			return stopped, nil
		}
	}
	return s, fmt.Errorf("%s: it is %s: %w", e, s, errdefs.ErrFailedPrecondition)
}
