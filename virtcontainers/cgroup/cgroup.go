// Package cgroup puts processes of the host into a cgroup: into the one of that path
// in every hierarchy that the host has, of version 1 and of version 2.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	for i, dir := range c.dirs {
		if err := makeDir(points[i], dir); err != nil {
			return nil, errors.Join(fmt.Errorf("make cgroup %s: %w", path, err), Remove(context.Background(), c.created))
		}
	}
	return c, nil
}

// makeDir makes dir, below the hierarchy's root, and what it is in. A cgroup of
// cpuset takes no process before it is told CPUs and nodes; it gets those of what it
// is in.
func makeDir(root, dir string) error {
	if dir == root {
		return nil
	}
	if err := makeDir(root, filepath.Dir(dir)); err != nil {
		return err
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

// inherit copies a file of cgroup v1's cpuset from the cgroup that dir is in, if it
// is empty. In version 2, where an empty one inherits by itself, it is left alone.
func inherit(dir, name string) error {
	if _, err := os.Lstat(filepath.Join(dir, "cgroup.controllers")); err == nil {
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

// Created are the directories that New was the one to make.
func (c *Cgroup) Created() []string { return slices.Clone(c.created) }

// Add moves a process, with all its threads, into the cgroup. What it starts from
// then on is in it too.
func (c *Cgroup) Add(pid int) error {
	for _, dir := range c.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move process %d into the cgroup: %w", pid, err)
		}
	}
	return nil
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
