package socket

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mountOver mounts the socket at path over the one of the host's at over, unless it
// is there. over is in a shared directory, in which a container may write: no
// symbolic link on the way is followed.
//
// The mount lasts as long as the guest's kernel takes the host's file for the one
// that was there: when that is deleted or replaced on the host, and the kernel
// notices, it takes the mount away by itself.
func mountOver(path, over string) error {
	if over == "" {
		return nil
	}
	if err := refresh(path, over); err != nil {
		return err
	}
	target, err := open(over)
	if err != nil {
		return err
	}
	defer target.Close() //nolint:errcheck // nothing was written
	if ours, err := same(path, target); ours || err != nil {
		return err // those who connect meanwhile do not find the host's
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(target.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s is no socket any more: %w", over, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	tree := os.NewFile(uintptr(fd), path)
	defer tree.Close() //nolint:errcheck // moved
	err = unix.MoveMount(fd, "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("mount over %s: %w", over, os.NewSyscallError("move_mount", err))
	}
	return nil
}

// unmount takes the mount of path's socket from over. One that is not there, or
// whose place is gone, is no error.
func unmount(path, over string) error {
	mounted, err := open(over)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer mounted.Close() //nolint:errcheck // nothing was written
	if ours, err := same(path, mounted); !ours || err != nil {
		return err // it is the host's
	}
	// Lazily: the descriptor itself holds it. A copy elsewhere goes with it, where
	// the mount had propagated there.
	err = unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", mounted.Fd()), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it went by itself
		return fmt.Errorf("unmount %s: %w", over, err)
	}
	return nil
}

// same tells whether an open file is the one at path.
func same(path string, file *os.File) (bool, error) {
	var a, b unix.Stat_t
	if err := unix.Lstat(path, &a); err != nil {
		return false, fmt.Errorf("stat %s: %w", path, err)
	}
	if err := unix.Fstat(int(file.Fd()), &b); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	return a.Dev == b.Dev && a.Ino == b.Ino, nil
}

// open opens a path of the share without following a symbolic link. The error is
// NotFound where there is nothing.
func open(path string) (*os.File, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, how)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("open %s: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// refresh has the kernel ask the host for each element of over that it may have
// cached, from the root of the file system that over is in: it would otherwise
// believe for a second that a file is still the one that it was.
//
// link(2) of a file to a name looks that name up with the demand that it be not
// there, for which nothing cached is good enough, and then finds that it is
// (EEXIST), or that the file is of another file system (EXDEV): so it changes
// nothing, whatever is there.
func refresh(path, over string) error {
	var names []string
	for p := over; p != "/"; p = filepath.Dir(p) {
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, p, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, 0, &st)
		if err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
			break
		}
		names = append(names, p)
	}
	for _, p := range slices.Backward(names) {
		if err := lookUp(path, p); err != nil {
			return err
		}
	}
	return nil
}

// lookUp has the kernel look up the last element of p. The error is NotFound where
// there is nothing.
func lookUp(path, p string) error {
	dir, err := open(filepath.Dir(p))
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	err = unix.Linkat(unix.AT_FDCWD, path, int(dir.Fd()), filepath.Base(p), 0)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("look up %s: %w", p, errdefs.ErrNotFound)
	case err == nil: // of the sockets' own file system: there was nothing, and it is no share
		return errors.Join(fmt.Errorf("look up %s: %w", p, errdefs.ErrNotFound), unix.Unlinkat(int(dir.Fd()), filepath.Base(p), 0))
	}
	return fmt.Errorf("look up %s: %w", p, err)
}
