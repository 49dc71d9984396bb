package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// BindMemory has what the processes in the cgroup allocate come from those memory nodes,
// a list as in cpuset.mems, and moves there what they have. A host that gives the cgroup
// no cpusets binds nothing.
func (c *Cgroup) BindMemory(nodes string) error {
	for _, dir := range c.dirs {
		// Version 2 always moves; in version 1 it must be asked for first.
		err := os.WriteFile(filepath.Join(dir, "cpuset.memory_migrate"), []byte("1"), 0)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = os.WriteFile(filepath.Join(dir, "cpuset.mems"), []byte(nodes), 0)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("bind the pod's memory to nodes %s: %w", nodes, err)
		}
	}
	return nil
}
