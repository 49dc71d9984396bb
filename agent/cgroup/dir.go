// Package cgroup reads and writes the files of cgroups of version 2.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Dir is the directory of a cgroup v2. One that is not there has no
// processes.
type Dir string

// dirs returns the cgroup and all below it, parents first.
func (c Dir) dirs() ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(string(c), func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return err
	})
	return dirs, err
}

// Pids lists the processes in the cgroup and below.
func (c Dir) Pids() ([]int, error) {
	dirs, err := c.dirs()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP):
			continue // gone meanwhile, or threaded: its processes are shown above
		case err != nil:
			return nil, err
		}
		for field := range bytes.FieldsSeq(b) {
			pid, err := strconv.Atoi(string(field))
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", dir, err)
			}
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Kill sends a signal to all processes in the cgroup and below: SIGKILL to all
// at one stroke, any other one by one.
func (c Dir) Kill(signal syscall.Signal) error {
	if signal == syscall.SIGKILL {
		err := os.WriteFile(filepath.Join(string(c), "cgroup.kill"), []byte("1"), 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	}
	pids, err := c.Pids()
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		if err := unix.Kill(pid, signal); err != nil && err != unix.ESRCH {
			errs = append(errs, fmt.Errorf("process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// WaitEmpty returns when no process is left in the cgroup or below. The kernel
// tells of it by a priority event on cgroup.events.
func (c Dir) WaitEmpty(timeout time.Duration) error {
	f, err := os.Open(filepath.Join(string(c), "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	deadline := time.Now().Add(timeout)
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if errors.Is(err, unix.ENODEV) || bytes.Contains(buf[:n], []byte("populated 0")) {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			pids, _ := c.Pids()
			return fmt.Errorf("processes %v do not end within %s of SIGKILL", pids, timeout)
		}
		poll := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(poll, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll cgroup: %w", err)
		}
	}
}

// Remove removes the cgroup and all below it. They are empty.
func (c Dir) Remove() error {
	dirs, err := c.dirs()
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range slices.Backward(dirs) {
		if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}
