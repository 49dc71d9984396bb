package virtcontainers

import (
	"errors"
	"fmt"

	"github.com/husk-containers/husk/hypervisor"
)

// TakeOOM tells, once, that a process of the container was killed for want of memory.
func (c *Container) TakeOOM() bool { return c.ooms.Take() }

// wake has somebody ask TakeOOM.
func (c *Container) wake() {
	select {
	case c.sandbox.ooms <- c.id:
	default: // it is told with the exit
	}
}

// oomKills counts the host's kills in the pod's cgroup for want of memory; 0 where that
// is not known.
func (s *Sandbox) oomKills() uint64 {
	if s.cgroup == nil {
		return 0
	}
	n, err := s.cgroup.OOMKills()
	if err != nil {
		s.log.Warn("whether the host runs out of memory for the pod is not known", "err", err)
	}
	return n
}

// onEnd is called when the VM has ended of itself. Where the host's OOM killer was behind
// it, or the guest's kernel had no memory left, every container has run out of memory, and
// is told of before its exit.
func (s *Sandbox) onEnd(cause error) error {
	var told error
	switch {
	case errors.Is(cause, hypervisor.ErrKilled) && s.oomKills() > s.oomsAtBoot:
		told = fmt.Errorf("the host ran out of memory for the pod, and its OOM killer chose the VM: raise the pod's memory limit, or the RuntimeClass's overhead: %w", cause)
	case errors.Is(cause, hypervisor.ErrGuestOOM):
		told = fmt.Errorf("%w: raise the pod's memory limit, or hypervisor.default_memory_mib for pods without one", cause)
	default:
		return cause
	}
	for _, c := range s.Containers() {
		if state := c.init.State(); state == Running || state == Paused {
			c.ooms.End(^uint64(0))
			c.wake()
		}
	}
	return told
}
