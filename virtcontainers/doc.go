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

	"github.com/husk-containers/husk/virtcontainers/record"
)

// Cleanup takes back, in a fresh process, everything that the sandbox of a bundle
// still holds after its shim has died.
func Cleanup(_ context.Context, bundle string) error { return record.Cleanup(bundle) }
