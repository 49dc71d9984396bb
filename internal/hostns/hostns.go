// Package hostns reaches file systems of the host from a process that has a mount
// namespace of its own.
package hostns

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace is a mount namespace held by an open file. Its methods are safe
// for concurrent use.
type Namespace struct{ file *os.File }

// New takes over file, an open /proc/PID/ns/mnt.
func New(file *os.File) *Namespace { return &Namespace{file: file} }

// Clone returns a detached copy of the mounts at and below an absolute path as
// that namespace has them now, whatever their propagation: an O_PATH file for
// move_mount, or for reading below /proc/self/fd. They are unmounted when it is
// closed, unless they were moved.
func (n *Namespace) Clone(path string) (*os.File, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	go func() {
		// The thread is in the other namespace from here on; it is never
		// unlocked, and so ends with the goroutine.
		runtime.LockOSThread()
		fd, err := n.clone(path)
		done <- result{fd, err}
	}()
	r := <-done
	if r.err != nil {
		return nil, fmt.Errorf("clone the host's mounts at %q: %w", path, r.err)
	}
	return os.NewFile(uintptr(r.fd), path), nil
}

func (n *Namespace) clone(path string) (int, error) {
	// setns demands that no other thread shares the root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return -1, os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNS); err != nil {
		return -1, os.NewSyscallError("setns", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	return fd, nil
}

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.file.Close() }
