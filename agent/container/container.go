// Package container runs containers in the guest by an OCI runtime.
package container

import (
	"context"
	"os"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent/reap"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Runtime runs containers. Its methods are safe for concurrent use; the
// caller sees to it that calls on one container come in an order that makes
// sense. Errors are one line and carry an errdefs class.
type Runtime interface {
	// Create makes a container whose process waits for Start. On error nothing
	// of it is left. AlreadyExists where the id is in use. fileSystems are the
	// directories at which the host's file systems for it appear. NotFound where
	// the spec names the PID namespace of a container (agentv1.ContainerPID) that
	// has ended.
	Create(ctx context.Context, id string, spec *specs.Spec, fileSystems []string, stdio Stdio) (*Process, error)
	// Hold adds to the fileSystems of a container. NotFound where it is not there.
	Hold(ctx context.Context, id string, fileSystems []string) error
	// Start lets the process of a created container run.
	Start(ctx context.Context, id string) error
	// Exec runs one more process in a container. The pair of ids is not in use.
	Exec(ctx context.Context, id, execID string, process *specs.Process, stdio Stdio) (*Process, error)
	// Kill sends a signal to every process of a container.
	Kill(ctx context.Context, id string, signal syscall.Signal) error
	// KillRest kills what is left of a container whose first process has ended,
	// and returns when it is gone.
	KillRest(ctx context.Context, id string) error
	// Pids lists the processes of a container.
	Pids(ctx context.Context, id string) ([]int, error)
	// Update changes what a container may use: all that r says, or, on error, nothing.
	// Devices are those that it was created with; others are InvalidArgument.
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	// Pause stops every process of a container, and returns once they stand. Where
	// ctx ends before, or on another error, they go on.
	Pause(ctx context.Context, id string) error
	// Resume lets the processes of a paused container go on.
	Resume(ctx context.Context, id string) error
	// Stats tells what a container uses; of the empty id, all together. It waits for
	// no process. NotFound where nothing of it is left.
	Stats(ctx context.Context, id string) (*agentv1.StatsContainerResponse, error)
	// Delete kills what still runs in a container and removes all that Create
	// made. It is idempotent, and so is no error where there never was one.
	Delete(ctx context.Context, id string) error
}

// Stdio is what a process gets as its standard streams. The files stay the
// caller's; nil is /dev/null.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
	// Terminal: the process gets a terminal in place of all three.
	Terminal bool
	// Columns and Rows are the terminal's initial size in cells; 0: not set.
	Columns, Rows uint16
}

// A Process is a process in a container.
type Process struct {
	*reap.Process
	// Console is the master of the process's terminal, in non-blocking mode;
	// nil where it has none. The receiver closes it.
	Console *os.File
}
