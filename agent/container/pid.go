package container

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent/reap"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A joinedPID is the PID namespace of another container that a new one joins. The
// zero value is that of a container which joins none.
type joinedPID struct {
	container string
	init      *reap.Process
	namespace *os.File // leads the OCI runtime to it
}

// joinPID finds the PID namespace that the spec names, if it does: it makes the
// shared one, or has the spec lead to another container's for as long as what it
// returns is open.
func (c *Crun) joinPID(ctx context.Context, spec *specs.Spec) (joinedPID, error) {
	for i := range spec.Linux.Namespaces {
		ns := &spec.Linux.Namespaces[i]
		if ns.Type != specs.PIDNamespace || ns.Path == "" {
			continue
		}
		if c.cfg.SharedPID != nil && ns.Path == c.cfg.SharedPID.Path() {
			return joinedPID{}, c.cfg.SharedPID.Make(ctx)
		}
		id, ok := agentv1.ContainerOfPID(ns.Path)
		if !ok {
			return joinedPID{}, fmt.Errorf("PID namespace %q: there is none: %w", ns.Path, errdefs.ErrInvalidArgument)
		}
		j, err := c.openPID(id)
		if err != nil {
			return joinedPID{}, fmt.Errorf("PID namespace of container %q: %w", id, err)
		}
		ns.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), j.namespace.Fd())
		return j, nil
	}
	return joinedPID{}, nil
}

// openPID opens the PID namespace of a container, or is NotFound where that has
// ended.
func (c *Crun) openPID(id string) (joinedPID, error) {
	c.mu.Lock()
	init := c.inits[id]
	c.mu.Unlock()
	if init == nil {
		return joinedPID{}, fmt.Errorf("there is no such container: %w", errdefs.ErrNotFound)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", init.PID()))
	j := joinedPID{id, init, f}
	if j.ended() { // and so the number may have been another process's
		f.Close() //nolint:errcheck // nil, or of no more use
		return joinedPID{}, fmt.Errorf("the container has ended: %w", errdefs.ErrNotFound)
	}
	return j, err
}

// ended tells whether the container's first process is there no more. While it is,
// its number is not another's.
func (j joinedPID) ended() bool { return j.init.Signal(syscall.Signal(0)) == os.ErrProcessDone }

// explain says of a failure to make the new container that there is no namespace to
// join any more, where that is so.
func (j joinedPID) explain(err error) error {
	if err == nil || j.init == nil || !j.ended() {
		return err
	}
	return fmt.Errorf("PID namespace of container %q: the container has ended: %w", j.container, errdefs.ErrNotFound)
}

// close lets go of the namespace.
func (j joinedPID) close() {
	if j.namespace != nil {
		j.namespace.Close() //nolint:errcheck // nothing was written
	}
}
