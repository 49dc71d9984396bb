package virtcontainers

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A ProcessState is where a process is in its life.
//
//	from \ to  created  running  stopped  deleted
//	(new)         x
//	created                x        x        x
//	running                         x
//	stopped                                  x
//
// Created to stopped is a kill before the start, a start that failed, or the
// VM's end. Created to deleted is an exec that was never started.
type ProcessState int

// The states of a process.
const (
	Created ProcessState = iota + 1
	Running
	Stopped
	Deleted
)

// String returns the state's name in lower case.
func (s ProcessState) String() string {
	switch s {
	case Created:
		return "created"
	case Running:
		return "running"
	case Stopped:
		return "stopped"
	case Deleted:
		return "deleted"
	}
	return fmt.Sprintf("state %d", int(s))
}

var processMoves = map[ProcessState][]ProcessState{
	Created: {Running, Stopped, Deleted},
	Running: {Stopped},
	Stopped: {Deleted},
}

// A SandboxState is where a sandbox is in its life.
//
//	from \ to  booting  running  failed  stopped
//	(new)         x
//	booting                x        x       x
//	running                         x       x
//	failed                                  x
//
// Failed: the VM could not be booted or ended of itself; its processes have
// exited, and Stop takes back what is left. Stopped is final.
type SandboxState int

// The states of a sandbox.
const (
	SandboxBooting SandboxState = iota + 1
	SandboxRunning
	SandboxFailed
	SandboxStopped
)

// String returns the state's name in lower case.
func (s SandboxState) String() string {
	switch s {
	case SandboxBooting:
		return "booting"
	case SandboxRunning:
		return "running"
	case SandboxFailed:
		return "failed"
	case SandboxStopped:
		return "stopped"
	}
	return fmt.Sprintf("state %d", int(s))
}

var sandboxMoves = map[SandboxState][]SandboxState{
	SandboxBooting: {SandboxRunning, SandboxFailed, SandboxStopped},
	SandboxRunning: {SandboxFailed, SandboxStopped},
	SandboxFailed:  {SandboxStopped},
}

// move returns to where the table allows it after from, and otherwise a
// FailedPrecondition that names both.
func move[S interface {
	comparable
	fmt.Stringer
}](table map[S][]S, what string, from, to S,
) (S, error) {
	for _, s := range table[from] {
		if s == to {
			return to, nil
		}
	}
	return from, fmt.Errorf("%s is %s and cannot become %s: %w", what, from, to, errdefs.ErrFailedPrecondition)
}
