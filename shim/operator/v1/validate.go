package operatorv1

import (
	"fmt"

	"github.com/containerd/errdefs"
)

const (
	// maxVCPUs is more than any machine has.
	maxVCPUs = 1 << 12
	// maxContainers is more than any pod has.
	maxContainers = 1 << 12
)

// Validate reports what an answer says that cannot be: numbers and threads of vCPUs are
// unique, states are known, and there are not more of them than there can be.
func (m *StatusResponse) Validate() error {
	if m.GetState() != StatusResponse_STATE_RUNNING && m.GetState() != StatusResponse_STATE_PAUSED {
		return invalid("state %v", m.GetState())
	}
	if n := len(m.GetVcpus()); n > maxVCPUs {
		return invalid("%d vCPUs, at most %d", n, maxVCPUs)
	}
	numbers, threads := map[uint32]bool{}, map[uint32]bool{}
	for _, v := range m.GetVcpus() {
		if v.GetThread() == 0 || numbers[v.GetNumber()] || threads[v.GetThread()] {
			return invalid("vCPU %d on thread %d: no thread, or one of them is there twice", v.GetNumber(), v.GetThread())
		}
		numbers[v.GetNumber()], threads[v.GetThread()] = true, true
	}
	if n := len(m.GetContainers()); n > maxContainers {
		return invalid("%d containers, at most %d", n, maxContainers)
	}
	for _, c := range m.GetContainers() {
		if _, known := Container_State_name[int32(c.GetState())]; c.GetId() == "" || !known || c.GetState() == Container_STATE_UNSPECIFIED {
			return invalid("container %q in state %v", c.GetId(), c.GetState())
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
