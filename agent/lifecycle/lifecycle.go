// Package lifecycle is the states of a process in the guest, and what leads from one to
// the next.
package lifecycle

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A State is where a process, a container's first or an exec, stands. A
// container is in the state of its first process.
//
//	             made     start     started   failed   pause    frozen  resume    thawed   exited    remove    kept
//	creating     created
//	created               starting                                                       stopped   removing
//	starting                        running   created                                    stopped   removing
//	running                                            pausing                           stopped   removing
//	pausing                                                     paused            running  stopped   removing
//	paused                                                              resuming           stopped   removing
//	resuming                                                    paused            running  stopped   removing
//	stopped                         stopped   stopped           stopped           stopped            removing
//	removing                        removing  removing          removing          removing removing            stopped
//
// Pause and resume are of containers: their execs go on being running.
// An exec goes from creating by way of created and starting to running in one
// step. The initial state is creating; the end of removing is that nobody knows
// the process any more. Where there is no entry the event is refused.
type State uint8

// The states.
const (
	Creating State = iota + 1
	Created
	Starting
	Running
	Pausing
	Paused
	Resuming
	Stopped
	Removing
)

func (s State) String() string {
	switch s {
	case Creating:
		return "being created"
	case Created:
		return "created"
	case Starting:
		return "being started"
	case Running:
		return "running"
	case Pausing:
		return "being paused"
	case Paused:
		return "paused: resume it first"
	case Resuming:
		return "being resumed"
	case Stopped:
		return "stopped"
	case Removing:
		return "being removed"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// An Event is what happens to a process.
type Event uint8

// The events.
const (
	Made    Event = iota + 1 // the runtime has made it
	Start                    // the host wants it started
	Started                  // the runtime has started it
	Failed                   // the runtime could not start it
	Pause                    // the host wants it to stand
	Frozen                   // it stands: it does now, or it could not be resumed
	Resume                   // the host wants it to go on
	Thawed                   // it goes on: it does now, or it could not be paused
	Exited                   // it has ended
	Remove                   // the host wants it gone
	Kept                     // it could not be removed
)

func (e Event) String() string {
	switch e {
	case Made:
		return "made"
	case Start:
		return "start"
	case Started:
		return "started"
	case Failed:
		return "failed"
	case Pause:
		return "pause"
	case Frozen:
		return "frozen"
	case Resume:
		return "resume"
	case Thawed:
		return "thawed"
	case Exited:
		return "exited"
	case Remove:
		return "remove"
	case Kept:
		return "kept"
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// Next is the transition function. A refusal is FailedPrecondition.
func Next(s State, e Event) (State, error) {
	switch s {
	case Creating:
		if e == Made {
			return Created, nil
		}
	case Created:
		switch e {
		case Start:
			return Starting, nil
		case Exited:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Starting:
		switch e {
		case Started:
			return Running, nil
		case Failed:
			return Created, nil
		case Exited:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Running:
		switch e {
		case Pause:
			return Pausing, nil
		case Exited:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Pausing, Resuming:
		switch e {
		case Frozen:
			return Paused, nil
		case Thawed:
			return Running, nil
		case Exited:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Paused:
		switch e {
		case Resume:
			return Resuming, nil
		case Exited:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Stopped:
		switch e {
		case Started, Failed, Frozen, Thawed:
			return Stopped, nil
		case Remove:
			return Removing, nil
		}
	case Removing:
		switch e {
		case Started, Failed, Frozen, Thawed, Exited:
			return Removing, nil
		case Kept:
			return Stopped, nil
		}
	}
	return s, fmt.Errorf("%s: it is %s: %w", e, s, errdefs.ErrFailedPrecondition)
}
