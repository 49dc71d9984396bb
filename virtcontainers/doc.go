// Package virtcontainers is the model: a sandbox is one VM, a container lives in
// a sandbox, a process in a container, and each has a table of states and takes
// back what it took.
//
//	Sandbox ──1:1── hypervisor.VM ── control connection ── agent
//	   └──1:n── Container ──1:n── Process ── one stream connection each for
//	                                         stdin, stdout, stderr
package virtcontainers

import (
	"context"

	"github.com/husk-containers/husk/virtcontainers/process"
	"github.com/husk-containers/husk/virtcontainers/record"
	"github.com/husk-containers/husk/virtcontainers/streams"
)

// The model's words for a process.
type (
	// A Process is a container's init or one exec in it; ProcessState tells its life.
	Process = process.Process
	// A ProcessState is where a process is in its life.
	ProcessState = process.State
	// An Exit is how and when a process ended.
	Exit = process.Exit
	// Stdio is the host's end of a process's standard streams.
	Stdio = streams.Stdio
)

// The states of a process.
const (
	Created = process.Created
	Running = process.Running
	Paused  = process.Paused
	Stopped = process.Stopped
	Deleted = process.Deleted
)

// Cleanup takes back, in a fresh process, everything that the sandbox of a bundle
// still holds after its shim has died.
func Cleanup(ctx context.Context, bundle string) error { return record.Cleanup(ctx, bundle) }
