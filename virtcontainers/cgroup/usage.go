package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Usage is what the processes in a cgroup, and in those in it, use of the host.
type Usage struct {
	// MemoryBytes that are charged: anonymous memory, memfds and page cache. Of these
	// AnonBytes are the first, and InactiveFileBytes what the kernel takes back first.
	MemoryBytes, AnonBytes, InactiveFileBytes uint64
	// CPUMicros is the processor time since the cgroup was made, in microseconds, of which
	// the others are the shares of programs and of the kernel.
	CPUMicros, UserMicros, SystemMicros uint64
	// Pids are processes and threads.
	Pids uint64
}

// Usage returns what is used now. It is NotFound where the host has not given the
// cgroup a controller that is needed, or the cgroup is gone.
func (c *Cgroup) Usage() (Usage, error) {
	var u Usage
	for _, f := range []struct {
		to *uint64
		// of version 2 and of version 1; those of a file of lines have a key.
		file, key, file1, key1 string
		unit1                  uint64 // of the latter
	}{
		{&u.MemoryBytes, "memory.current", "", "memory.usage_in_bytes", "", 1},
		{&u.AnonBytes, "memory.stat", "anon", "memory.stat", "total_rss", 1},
		{&u.InactiveFileBytes, "memory.stat", "inactive_file", "memory.stat", "total_inactive_file", 1},
		{&u.CPUMicros, "cpu.stat", "usage_usec", "cpuacct.usage", "", 1000},
		{&u.UserMicros, "cpu.stat", "user_usec", "cpuacct.usage_user", "", 1000},
		{&u.SystemMicros, "cpu.stat", "system_usec", "cpuacct.usage_sys", "", 1000},
		{&u.Pids, "pids.current", "", "pids.current", "", 1},
	} {
		n, err := c.figure(f.file1, f.key1)
		unit := f.unit1
		if errdefs.IsNotFound(err) {
			n, err = c.figure(f.file, f.key)
			unit = 1
		}
		if err != nil {
			return Usage{}, err
		}
		*f.to = n / unit
	}
	return u, nil
}

// figure is a number that a file has, or one of its lines.
func (c *Cgroup) figure(file, key string) (uint64, error) {
	name, raw, err := c.read(file)
	if err != nil {
		return 0, err
	}
	if key == "" {
		return number(name, raw)
	}
	return value(name, raw, key)
}

// OOMKills counts the processes of the cgroup that the kernel has killed for want of
// memory, whether the limit that was met is the cgroup's, that of one above, or the
// host's memory: the kernel counts a kill in the cgroup of who was killed. It is
// NotFound as Usage is.
func (c *Cgroup) OOMKills() (uint64, error) {
	name, raw, err := c.read("memory.events", "memory.oom_control")
	if err != nil {
		return 0, err
	}
	return value(name, raw, "oom_kill")
}

// PidsMax returns the least limit of processes and threads that holds for the cgroup:
// its own or that of one above. It is false where there is none.
func (c *Cgroup) PidsMax() (limit uint64, limited bool, err error) {
	for _, dir := range c.dirs {
		for ; ; dir = filepath.Dir(dir) { // the root has no such file
			name := filepath.Join(dir, "pids.max")
			raw, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return 0, false, err
			}
			if strings.TrimSpace(string(raw)) == "max" {
				continue
			}
			n, err := number(name, raw)
			if err != nil {
				return 0, false, err
			}
			if !limited || n < limit {
				limit, limited = n, true
			}
		}
	}
	return limit, limited, nil
}

// Processes lists the process ids in the cgroup, in ascending order.
func (c *Cgroup) Processes() ([]int, error) {
	name, raw, err := c.read("cgroup.procs")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(raw)) {
		pid, err := number(name, []byte(field))
		if err != nil {
			return nil, err
		}
		pids = append(pids, int(pid))
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// read returns the first of the files that a hierarchy has, and its name.
func (c *Cgroup) read(names ...string) (string, []byte, error) {
	for _, name := range names {
		for _, dir := range c.dirs {
			raw, err := os.ReadFile(filepath.Join(dir, name))
			if err == nil {
				return name, raw, nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return "", nil, err
			}
		}
	}
	return "", nil, fmt.Errorf("read %s of the pod's cgroup: the cgroup is gone, or its controller is not enabled on the way to it: %w",
		strings.Join(names, " or "), errdefs.ErrNotFound)
}

// number parses a file that holds one.
func number(name string, raw []byte) (uint64, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", name, err)
	}
	return n, nil
}

// value finds a key's number in a file of lines of both.
func value(name string, raw []byte, key string) (uint64, error) {
	for line := range strings.Lines(string(raw)) {
		if k, v, _ := strings.Cut(line, " "); k == key {
			return number(name, []byte(v))
		}
	}
	return 0, fmt.Errorf("%s has no %s: %w", name, key, errdefs.ErrNotFound)
}
