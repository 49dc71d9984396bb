package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// fileSystems are the host's file systems that a container uses, as submounts of
// the virtio-fs share, held in the agent's own mount namespace for as long as the
// container is there.
//
// The kernel mounts a submount where it is first walked into. That must not be the
// container's mount namespace alone: its last process would unmount it as it ends,
// and when a read-ahead of that process's own program is still under way then, the
// kernel (6.1, fs/fuse: the last reference to the file, and so to its inode, goes
// with the answer) finds "Busy inodes after unmount", stops the process for good
// inside its exit, and nobody ever learns of that.
type fileSystems []*os.File

// hold walks into each directory. One that is no directory, or none any more, is no
// submount.
func hold(directories []string) (fileSystems, error) {
	var held fileSystems
	for _, dir := range directories {
		f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold file system: %w", err), held.release())
		}
		held = append(held, f)
	}
	return held, nil
}

// release unmounts what is held, the last first.
func (held fileSystems) release() error {
	var errs []error
	for i := len(held) - 1; i >= 0; i-- {
		f := held[i]
		// The host answers in order: after the first answer no read is under way,
		// and after the second the closes have been answered that came of the reads.
		var st unix.Statfs_t
		for range 2 {
			unix.Fstatfs(int(f.Fd()), &st) //nolint:errcheck // the answer counts, not what it is
		}
		err := unix.Unmount(f.Name(), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT { // not, or no longer, a mount
			errs = append(errs, fmt.Errorf("let go of file system %s: %w", f.Name(), err))
		}
		f.Close() //nolint:errcheck // a path only
	}
	return errors.Join(errs...)
}
