// Package hostns reaches file systems of the host from a process that has a mount
// namespace of its own.
package hostns

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace is a mount namespace held by an open file; nil is the process's own.
// Its methods are safe for concurrent use.
type Namespace struct{ file *os.File }

// New takes over file, an open /proc/PID/ns/mnt.
func New(file *os.File) *Namespace { return &Namespace{file: file} }

// Clone returns a detached copy of the mount at an absolute path, with recursive
// also of those below it, as that namespace has them now: an O_PATH file for
// move_mount, or for reading below /proc/self/fd. The copy is unmounted when it is
// closed, unless it was moved; it propagates as its origin does.
func (n *Namespace) Clone(path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	file, err := n.inside(path, func() (int, error) {
		fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
		return fd, os.NewSyscallError("open_tree", err)
	})
	if err != nil {
		return nil, fmt.Errorf("clone the host's mounts at %q: %w", path, err)
	}
	return file, nil
}

// Resolve returns where an absolute path leads in the namespace now: the path
// without a symbolic link.
func (n *Namespace) Resolve(path string) (string, error) {
	file, err := n.inside(path, func() (int, error) {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		return fd, os.NewSyscallError("open", err)
	})
	if err != nil {
		return "", fmt.Errorf("resolve %q on the host: %w", path, err)
	}
	defer file.Close() //nolint:errcheck // nothing was written
	resolved, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		return "", fmt.Errorf("resolve %q on the host: %w", path, err)
	}
	return resolved, nil
}

// Open returns an O_PATH file of what is at an absolute path in the namespace now.
// A path with a symbolic link in it, its last element included, is an error: what
// was resolved once cannot be made to lead elsewhere by who may write on the way.
func (n *Namespace) Open(path string) (*os.File, error) {
	file, err := n.inside(path, func() (int, error) {
		how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_NO_SYMLINKS}
		fd, err := unix.Openat2(unix.AT_FDCWD, path, how)
		return fd, os.NewSyscallError("openat2", err)
	})
	if err != nil {
		return nil, fmt.Errorf("open %q on the host: %w", path, err)
	}
	return file, nil
}

// inside returns the file that open opens in the namespace.
func (n *Namespace) inside(name string, open func() (int, error)) (*os.File, error) {
	type result struct {
		fd  int
		err error
	}
	if n == nil {
		fd, err := open()
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
	done := make(chan result)
	go expend(func() {
		err := n.enter()
		if err != nil {
			done <- result{-1, err}
			return
		}
		fd, err := open()
		done <- result{fd, err}
	})
	r := <-done
	if r.err != nil {
		return nil, r.err
	}
	return os.NewFile(uintptr(r.fd), name), nil
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

// enter leaves the calling thread in the namespace.
func (n *Namespace) enter() error {
	// setns demands that no other thread shares the root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("setns", unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNS))
}

// Close lets go of the namespace.
func (n *Namespace) Close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}
