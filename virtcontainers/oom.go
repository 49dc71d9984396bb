package virtcontainers

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/husk-containers/husk/hypervisor"
)

// oomPause is how long a container's next OOM is not told of: a guest in distress, or a
// hostile one, reports without end.
const oomPause = time.Second

// ooms are the times that a container ran out of memory. One that comes before its exit
// is told before it.
type ooms struct {
	mu    sync.Mutex
	count uint64    // that the guest has told of
	last  time.Time // that clients were to be told of
	due   bool      // clients have not been told
	ended bool      // with the container; nothing follows
}

// add notes what the guest has told, and reports whether clients are to be told.
func (o *ooms) add(now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.count++
	if o.ended || now.Sub(o.last) < oomPause {
		return false
	}
	o.due, o.last = true, now
	return true
}

// end notes the container's exit, up to which there were so many. What is on its way
// still has come in time, and is not told again.
func (o *ooms) end(count uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.due = o.due || count > o.count
	o.ended = true
}

// take reports whether clients are to be told, and takes it that they are.
func (o *ooms) take() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	due := o.due
	o.due = false
	return due
}

// TakeOOM tells, once, that a process of the container was killed for want of memory.
func (c *Container) TakeOOM() bool { return c.ooms.take() }

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
			c.ooms.end(^uint64(0))
			c.wake()
		}
	}
	return told
}
