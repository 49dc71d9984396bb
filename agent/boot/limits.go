package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// ReservedPids are of the kernel's threads those that containers may not have: its
	// own, the agent's and those of crun.
	ReservedPids = 512

	// agentMemory is never reclaimed from the agent and what it runs, in bytes.
	agentMemory = 24 << 20
	// agentWeight is the most there is: the agent's own work is short, and what a
	// host waits for.
	agentWeight = 10000
)

// protectAgent gives the agent's cgroup what the containers cannot take.
func protectAgent() error {
	for file, value := range map[string]int{"memory.min": agentMemory, "cpu.weight": agentWeight} {
		if err := os.WriteFile(filepath.Join(agentCgroup, file), []byte(strconv.Itoa(value)), 0); err != nil {
			return fmt.Errorf("protect the agent: %w", err)
		}
	}
	return nil
}

// SetPidsMax bounds the processes and threads of all containers together; 0: by what the
// kernel bears.
func (Machine) SetPidsMax(n uint64) error {
	most, err := maxThreads("/proc/sys/kernel")
	if err == nil {
		limit := most - min(ReservedPids, most/2)
		if n != 0 {
			limit = min(limit, n)
		}
		err = os.WriteFile(ContainersCgroup+"/pids.max", []byte(strconv.FormatUint(limit, 10)), 0)
	}
	if err != nil {
		return fmt.Errorf("bound processes of containers: %w", err)
	}
	return nil
}

// maxThreads is how many processes and threads the kernel bears.
func maxThreads(dir string) (uint64, error) {
	most := uint64(0)
	for _, name := range []string{"pid_max", "threads-max"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return 0, err
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(content)), 10, 32)
		if err != nil || n == 0 {
			return 0, errors.Join(fmt.Errorf("kernel.%s is %q", name, content), err)
		}
		if most == 0 || n < most {
			most = n
		}
	}
	return most, nil
}
