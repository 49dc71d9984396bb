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
		err := set(dir, "cpuset.memory_migrate", "1")
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = set(dir, "cpuset.mems", nodes)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("bind the pod's memory to nodes %s: %w", nodes, err)
		}
	}
	return nil
}

// set writes to a file of a cgroup. It does not ask for one that is not there to be
// made, as os.WriteFile does: the kernel's answer to that is EACCES, not ENOENT.
func set(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
