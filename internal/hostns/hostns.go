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

// Clone returns a detached copy of the mount at an absolute path, with recursive
// also of those below it, as that namespace has them now: an O_PATH file for
// move_mount, or for reading below /proc/self/fd. The copy is unmounted when it is
// closed, unless it was moved; it propagates as its origin does.
func (n *Namespace) Clone(path string, recursive bool) (*os.File, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result)
	go expend(func() {
		fd, err := n.clone(path, recursive)
		done <- result{fd, err}
	})
	r := <-done
	if r.err != nil {
		return nil, fmt.Errorf("clone the host's mounts at %q: %w", path, r.err)
	}
	return os.NewFile(uintptr(r.fd), path), nil
}

// expend runs f on a thread that is never unlocked, and so ends with the caller's
// goroutine. It is not the main thread, whose namespace /proc/self tells of.
func expend(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	defer runtime.UnlockOSThread()
	done := make(chan struct{})
	go func() { // on another thread, for this one is locked
		defer close(done)
		expend(f)
	}()
	<-done
}

// clone leaves the calling thread in the namespace.
func (n *Namespace) clone(path string, recursive bool) (int, error) {
	// setns demands that no other thread shares the root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return -1, os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNS); err != nil {
		return -1, os.NewSyscallError("setns", err)
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	return fd, nil
}

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.file.Close() }
