package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// A Stay is a process's time in a cgroup that was made for it. It ends where the
// process came from: the kernel removes no cgroup with a process in it.
type Stay struct {
	*Cgroup
	pid  int
	home []string
}

// NewStay is that of a process that is in the cgroup, or is about to be moved there;
// home are the directories (see Dirs) that it came from.
func NewStay(c *Cgroup, pid int, home []string) *Stay { return &Stay{Cgroup: c, pid: pid, home: home} }

// Resume is that of a process which was started in the cgroup, of which created are
// the directories to be removed.
func Resume(pid int, home, created []string) (*Stay, error) {
	c, err := Of(pid)
	if err != nil {
		return nil, err
	}
	c.created = created
	return NewStay(c, pid, home), nil
}

// End moves the process back, and removes the cgroup as Delete does.
func (s *Stay) End(ctx context.Context) error {
	var errs []error
	for _, dir := range s.home {
		errs = append(errs, moveBack(s.pid, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("leave the cgroup: %w", err)
	}
	return s.Delete(ctx)
}

// moveBack moves a process into a cgroup or, where that is gone or takes no process
// any more, into the nearest above it that does: a hierarchy's root always does.
func moveBack(pid int, dir string) error {
	first := move(dir, "cgroup.procs", pid)
	for err := first; err != nil; err = move(dir, "cgroup.procs", pid) {
		if dir == "/" {
			return first
		}
		dir = filepath.Dir(dir)
	}
	return nil
}

// move writes a process id to one of the files of a cgroup by which it takes them.
func move(dir, file string, pid int) error {
	// Not to be made: a directory that is no cgroup's has none.
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(pid))
	return errors.Join(err, f.Close())
}
