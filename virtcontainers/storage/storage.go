// Package storage puts directories and files of the host where the guest sees
// them: below the one directory that is shared with the VM by virtio-fs.
package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Expose makes the directory private, and share, which shows it read-only:
// what is mounted below private later appears below share as writable as it is
// itself, but the names that the host resolves are not the guest's to change. The
// mount namespace must propagate mounts within itself (rshared).
func Expose(private, share string) error {
	if err := os.Mkdir(private, 0o700); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, private, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("share: clone the mount of %s: %w", private, err)
	}
	defer unix.Close(fd) //nolint:errcheck // read-only use
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("share: make %s read-only: %w", share, err)
	}
	if err := os.Mkdir(share, 0o700); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, share, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("share: attach %s: %w", share, err)
	}
	return nil
}

// A Clone returns a detached copy of the mount at a host path, with recursive also
// of those below it, as an O_PATH file for move_mount.
type Clone func(path string, recursive bool) (*os.File, error)

// Here is the host as the process's own mount namespace has it.
type Here struct{}

// Resolve returns the path without a symbolic link.
func (Here) Resolve(path string) (string, error) { return filepath.EvalSymlinks(path) }

// Open returns an O_PATH file of what is at a path, which is no symbolic link.
func (Here) Open(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Clone is a Clone.
func (Here) Clone(path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil {
		return nil, &fs.PathError{Op: "clone the mount of", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// A Share is one container's part of the shared directory: its root file system.
type Share struct {
	dir, bundle string
	clone       Clone
	mounted     bool
}

// New makes the container's directory, which must not exist. A host path may be
// relative to the bundle; it is taken by clone.
func New(dir, bundle string, clone Clone) (*Share, error) {
	s := &Share{dir: dir, bundle: bundle, clone: clone}
	for _, d := range []string{dir, s.rootfs()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("share: %w", err), s.Close())
		}
	}
	return s, nil
}

func (s *Share) rootfs() string { return filepath.Join(s.dir, "rootfs") }

// Rootfs mounts the container's root file system: from mounts, or where there
// are none from the directory that the spec names.
func (s *Share) Rootfs(mounts []mount.Mount, dir string) error {
	s.mounted = true // of several mounts the first may have been made
	if len(mounts) > 0 {
		if err := mount.All(mounts, s.rootfs()); err != nil {
			return fmt.Errorf("mount the rootfs: %w", err)
		}
		return nil
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(s.bundle, dir)
	}
	tree, err := s.clone(dir, true)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("rootfs: %s does not exist: the image was not unpacked, or root.path in the spec is wrong: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	defer tree.Close() //nolint:errcheck // attached, or not wanted
	st, err := tree.Stat()
	if err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("rootfs: %s is not a directory: %w", dir, errdefs.ErrInvalidArgument)
	}
	if err := Attach(tree, s.rootfs(), Attributes{Recursive: true}); err != nil {
		return fmt.Errorf("rootfs: share %s: %w", dir, err)
	}
	return nil
}

// Attributes are how a clone is attached.
type Attributes struct {
	// Recursive: the clone has mounts below its root.
	Recursive bool
	// ReadOnly is of the root alone, AllReadOnly of all mounts.
	ReadOnly, AllReadOnly bool
}

// Attach attaches a clone at target. Before, it is made private, so that nothing which
// is mounted or unmounted below it reaches the origin, nor the other way; and read-only
// where asked: the guest never sees it writable.
func Attach(tree *os.File, target string, a Attributes) error {
	return attach(tree, target, unix.MS_PRIVATE, a)
}

func attach(tree *os.File, target string, propagation uint64, a Attributes) error {
	if err := set(tree, propagation, a); err != nil {
		return err
	}
	return os.NewSyscallError("move_mount", unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// set gives a clone its propagation and attributes.
func set(tree *os.File, propagation uint64, a Attributes) error {
	set := func(all bool, attr unix.MountAttr) error {
		flags := uint(unix.AT_EMPTY_PATH)
		if all {
			flags |= unix.AT_RECURSIVE
		}
		return os.NewSyscallError("mount_setattr", unix.MountSetattr(int(tree.Fd()), "", flags, &attr))
	}
	err := set(a.Recursive, unix.MountAttr{Propagation: propagation})
	if err == nil && (a.ReadOnly || a.AllReadOnly) {
		err = set(a.Recursive && a.AllReadOnly, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	return err
}

// Detach unmounts what is attached at target. That nothing is, is no error.
func Detach(target string) error {
	err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unshare %s: %w", target, err)
	}
	return nil
}

// FileSystems returns the directories at and below dir at which something is
// mounted, each after the one that it is below.
func FileSystems(dir string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("share: list what is mounted: %w", err)
	}
	var below []string
	for _, m := range mounts {
		below = append(below, m.Mountpoint)
	}
	slices.Sort(below)
	return slices.Compact(below), nil
}

// Close unmounts what was shared and removes the container's directory; never what
// the mounts showed.
func (s *Share) Close() error {
	if s.mounted {
		if err := Detach(s.rootfs()); err != nil {
			return err
		}
		s.mounted = false
	}
	if err := RemoveTree(s.dir); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	return nil
}
