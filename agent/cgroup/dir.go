// Package cgroup reads and writes the files of cgroups of version 2.
package cgroup

import (
	"bytes"
	"context"
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

// WaitEmpty returns when no process is left in the cgroup or below.
func (c Dir) WaitEmpty(timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	err := c.await(ctx, "populated 0")
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if ctx.Err() != nil {
		pids, _ := c.Pids()
		err = fmt.Errorf("processes %v do not end within %s of SIGKILL", pids, timeout)
	}
	return err
}

// Freeze stops every process in the cgroup and below, and returns once they stand.
// Where ctx ends before that they go on.
func (c Dir) Freeze(ctx context.Context) error {
	err := c.write("cgroup.freeze", "1")
	if err == nil {
		err = c.await(ctx, "frozen 1")
	}
	if err != nil {
		return errors.Join(err, c.write("cgroup.freeze", "0"))
	}
	return nil
}

// Thaw lets the processes in the cgroup and below go on.
func (c Dir) Thaw(ctx context.Context) error {
	if err := c.write("cgroup.freeze", "0"); err != nil {
		return err
	}
	return c.await(ctx, "frozen 0")
}

// await returns when cgroup.events has the line. The kernel tells of each change by
// inotify. fs.ErrNotExist where the cgroup is not there, or no longer.
func (c Dir) await(ctx context.Context, line string) error {
	file := c.file("cgroup.events")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("start inotify: %w", err)
	}
	inotify := os.NewFile(uintptr(fd), "inotify")
	defer inotify.Close()
	if _, err := unix.InotifyAddWatch(fd, file, unix.IN_MODIFY); err != nil {
		return &fs.PathError{Op: "watch", Path: file, Err: err}
	}
	defer context.AfterFunc(ctx, func() { inotify.SetReadDeadline(time.Unix(1, 0)) })() //nolint:errcheck // it can be polled
	buf := make([]byte, 1024)
	for {
		events, err := os.ReadFile(file)
		if errors.Is(err, unix.ENODEV) {
			err = fs.ErrNotExist
		}
		if err != nil {
			return err
		}
		if hasLine(events, line) {
			return nil
		}
		if _, err := inotify.Read(buf); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("wait for %q of cgroup %s: %w", line, filepath.Base(string(c)), err)
		}
	}
}

func hasLine(content []byte, line string) bool {
	for l := range bytes.Lines(content) {
		if string(bytes.TrimSuffix(l, []byte("\n"))) == line {
			return true
		}
	}
	return false
}

func (c Dir) file(name string) string { return filepath.Join(string(c), name) }

// write writes a control file, which the kernel has made.
func (c Dir) write(name, value string) error {
	f, err := os.OpenFile(c.file(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
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
