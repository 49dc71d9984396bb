// Package cgroup puts processes of the host into a cgroup, into the one of that path
// in every hierarchy that the host has, of version 1 and of version 2; and it reads
// what they use there.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// retry is the wait before a removal is tried again: the kernel may still count a
// process whose end it has told of already, and of that cgroup v1 has no event.
const retry = 10 * time.Millisecond

// A Cgroup is one cgroup of the host: a directory in each hierarchy.
type Cgroup struct {
	dirs    []string // in every hierarchy
	created []string // those of dirs that were not there
}

// New makes the cgroup at an absolute path (see Parse), where it is not there
// already, and what it is in. record is told of the directories before they are
// made, for Remove after a crash; nil: nobody is. On error nothing that it made is
// left but what the cgroup is to be in.
func New(path string, record func(dirs []string) error) (*Cgroup, error) {
	points, err := roots()
	if err != nil {
		return nil, err
	}
	return newBelow(points, path, record)
}

func newBelow(points []string, path string, record func(dirs []string) error) (*Cgroup, error) {
	c := &Cgroup{}
	for _, point := range points {
		dir := filepath.Join(point, path)
		c.dirs = append(c.dirs, dir)
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			c.created = append(c.created, dir)
		}
	}
	if record != nil && len(c.created) > 0 {
		if err := record(slices.Clone(c.created)); err != nil {
			return nil, err
		}
	}
	// Beside version 1 that of version 2 is for names alone: what controllers it has
	// are left as they are.
	unified := len(points) == 1 && isUnified(points[0])
	for i, dir := range c.dirs {
		if err := makeDir(points[i], dir, unified); err != nil {
			return nil, errors.Join(fmt.Errorf("make cgroup %s: %w", path, err), Remove(context.Background(), c.created))
		}
	}
	return c, nil
}

// makeDir makes dir, below the hierarchy's root, and what it is in, enabling the
// controllers on the way where it is told to. A cgroup of
// cpuset takes no process before it is told CPUs and nodes; it gets those of what it
// is in.
func makeDir(root, dir string, enabling bool) error {
	if dir == root {
		return nil
	}
	if err := makeDir(root, filepath.Dir(dir), enabling); err != nil {
		return err
	}
	if enabling {
		if err := enable(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		if err := inherit(dir, name); err != nil {
			return err
		}
	}
	return nil
}

// enable hands the controllers that a cgroup of version 2 has on to the cgroups in it,
// as far as the kernel lets it: a cgroup with processes in it can hand on few.
func enable(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "cgroup.subtree_control")
	given, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	on := strings.Fields(string(given))
	var missing []string
	for _, c := range strings.Fields(string(have)) {
		if !slices.Contains(on, c) {
			missing = append(missing, "+"+c)
		}
	}
	if len(missing) == 0 || os.WriteFile(path, []byte(strings.Join(missing, " ")), 0) == nil {
		return nil
	}
	for _, c := range missing { // one that cannot be had keeps none of the others
		os.WriteFile(path, []byte(c), 0) //nolint:errcheck // the figures that need it say that it is missing
	}
	return nil
}

// inherit copies a file of cgroup v1's cpuset from the cgroup that dir is in, if it
// is empty. In version 2, where an empty one inherits by itself, it is left alone.
func inherit(dir, name string) error {
	if isUnified(dir) {
		return nil
	}
	path := filepath.Join(dir, name)
	own, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(strings.TrimSpace(string(own))) > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	above, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
	if err != nil {
		return err
	}
	return os.WriteFile(path, above, 0)
}

// Dirs are the cgroup's directories, one for each hierarchy.
func (c *Cgroup) Dirs() []string { return slices.Clone(c.dirs) }

// Created are the directories that New was the one to make.
func (c *Cgroup) Created() []string { return slices.Clone(c.created) }

// Add moves a process, with all its threads, into the cgroup. What it starts from
// then on is in it too.
func (c *Cgroup) Add(pid int) error {
	for _, dir := range c.dirs {
		if err := move(dir, "cgroup.procs", pid); err != nil {
			return fmt.Errorf("move process %d into the cgroup: %w", pid, err)
		}
	}
	return nil
}

// Start starts a process that is in the cgroup from its first moment, while this one
// stays where it is. It needs Linux 5.7 where there is a hierarchy of version 2.
func (c *Cgroup) Start(cmd *exec.Cmd) error {
	for _, dir := range c.dirs {
		if !isUnified(dir) {
			continue
		}
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // read only
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
	return c.fork(cmd)
}

// fork starts a process while the thread is in the cgroup: in version 1 a thread may be
// in another than its process, and what it forks is in its own. A thread that moves
// itself is fast: it needs no halt of all forks on the host, as a process does.
func (c *Cgroup) fork(cmd *exec.Cmd) error {
	home, err := Of(os.Getpid())
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err = c.enterThread(); err == nil {
		err = cmd.Start()
	}
	// Should this fail, the process is started, and its starter, who ends soon, is in
	// the cgroup until then.
	home.enterThread() //nolint:errcheck // see above
	return err
}

// enterThread moves the calling thread into the cgroup, in version 1.
func (c *Cgroup) enterThread() error {
	for _, dir := range c.dirs {
		if isUnified(dir) {
			continue
		}
		if err := move(dir, "tasks", 0); err != nil { // 0 is the thread itself
			return fmt.Errorf("enter the cgroup: %w", err)
		}
	}
	return nil
}

// isUnified tells whether a cgroup is of version 2.
func isUnified(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, "cgroup.controllers"))
	return err == nil
}

// Delete removes the cgroup as far as New made it, when the processes in it have
// ended; those that it is in are left, as they may be others' by now. While there
// are processes in it, Delete waits until ctx ends.
func (c *Cgroup) Delete(ctx context.Context) error { return Remove(ctx, c.created) }

// Remove removes directories of cgroups, as they were recorded, and waits until ctx
// ends for their processes to end. One that is not there is no error.
func Remove(ctx context.Context, dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		if err := remove(ctx, dir); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func remove(ctx context.Context, dir string) error {
	for {
		err := unix.Rmdir(dir)
		switch {
		case err == nil, errors.Is(err, unix.ENOENT):
			return nil
		case !errors.Is(err, unix.EBUSY):
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		pause := time.NewTimer(retry)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) //nolint:errcheck // for the message
			return fmt.Errorf("remove cgroup %s: processes %q are in it: %w", dir, strings.Fields(string(procs)), err)
		}
	}
}
