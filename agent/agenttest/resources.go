package agenttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// Update implements container.Runtime: it remembers. A limit of memory of 1 byte is
// refused as one below what is in use.
func (r *Runtime) Update(_ context.Context, id string, resources *specs.LinuxResources) error {
	c, err := r.get(id)
	if err != nil {
		return err
	}
	if m := resources.Memory; m != nil && m.Limit != nil && *m.Limit == 1 {
		return fmt.Errorf("update container %q: more memory is in use: %w", id, errdefs.ErrFailedPrecondition)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c.resources = resources
	return nil
}

// Resources returns those of the container's last update; nil before any.
func (r *Runtime) Resources(id string) *specs.LinuxResources {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.containers[id]; c != nil {
		return c.resources
	}
	return nil
}

// Pause implements container.Runtime, by SIGSTOP.
func (r *Runtime) Pause(_ context.Context, id string) error {
	c, err := r.get(id)
	if err != nil {
		return err
	}
	return r.kill(c, syscall.SIGSTOP)
}

// Resume implements container.Runtime.
func (r *Runtime) Resume(_ context.Context, id string) error {
	c, err := r.get(id)
	if err != nil {
		return err
	}
	return r.kill(c, syscall.SIGCONT)
}

// Stats implements container.Runtime: of the processes there are the memory and the
// number, and the limit of memory is that of the last update.
func (r *Runtime) Stats(ctx context.Context, id string) (*agentv1.StatsContainerResponse, error) {
	ids := []string{id}
	if id == "" {
		r.mu.Lock()
		ids = ids[:0]
		for id := range r.containers {
			ids = append(ids, id)
		}
		r.mu.Unlock()
	}
	s := &agentv1.StatsContainerResponse{
		Cpu: &agentv1.CPUStats{}, Memory: &agentv1.MemoryStats{UsageLimit: 1<<64 - 1}, MemoryEvents: &agentv1.MemoryEvents{},
		Pids: &agentv1.PidsStats{Limit: 1<<64 - 1}, Io: &agentv1.IOStats{},
	}
	for _, one := range ids {
		pids, err := r.Pids(ctx, one)
		if err != nil {
			return nil, err
		}
		for _, pid := range pids {
			n, err := resident(pid)
			if err != nil {
				return nil, err
			}
			s.Memory.Usage += n
		}
		s.Pids.Current += uint64(len(pids))
	}
	if res := r.Resources(id); res != nil && res.Memory != nil && res.Memory.Limit != nil {
		s.Memory.UsageLimit = uint64(*res.Memory.Limit)
	}
	return s, nil
}

// resident is the memory of a process, in bytes; 0 where it has ended.
func resident(pid int) (uint64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseUint(string(bytes.Fields(content)[1]), 10, 64)
	return pages * uint64(os.Getpagesize()), err
}
