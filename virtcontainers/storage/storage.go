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
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/spec"
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

// cloneHere clones from the process's own mount namespace.
func cloneHere(path string, recursive bool) (*os.File, error) {
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

// A Share is one container's part of the shared directory.
type Share struct {
	dir, bundle string
	clone       Clone
	mounted     []string
}

// New makes the container's directory, which must not exist. Host paths may be
// relative to the bundle; they are taken by clone, or where that is nil from the
// process's own mount namespace.
func New(dir, bundle string, clone Clone) (*Share, error) {
	if clone == nil {
		clone = cloneHere
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("share: %w", err)
	}
	s := &Share{dir: dir, bundle: bundle, clone: clone}
	for _, d := range []string{"rootfs", "mnt"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("share: %w", err), s.Close())
		}
	}
	return s, nil
}

// Rootfs mounts the container's root file system: from mounts, or where there
// are none from the directory that the spec names.
func (s *Share) Rootfs(mounts []mount.Mount, dir string) error {
	target := filepath.Join(s.dir, "rootfs")
	if len(mounts) > 0 {
		// Recorded first: of several mounts the first may have been made.
		s.mounted = append(s.mounted, target)
		if err := mount.All(mounts, target); err != nil {
			return fmt.Errorf("mount the rootfs: %w", err)
		}
		return nil
	}
	dir = s.absolute(dir)
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
	if err := s.attach(tree, spec.Bind{Recursive: true}, target); err != nil {
		return fmt.Errorf("rootfs: share %s: %w", dir, err)
	}
	return nil
}

// Bind shows a directory or regular file of the host as the container's mount n.
// Mounts below a Recursive source are shown as they are now.
func (s *Share) Bind(n int, b spec.Bind) error {
	tree, err := s.source(&b)
	if err != nil {
		return err
	}
	defer tree.Close() //nolint:errcheck // attached, or not wanted
	st, err := tree.Stat()
	if err != nil {
		return fmt.Errorf("%s: source: %w", b.Field, err)
	}
	target := filepath.Join(s.dir, "mnt", strconv.Itoa(n))
	switch mode := st.Mode(); {
	case mode.IsDir():
		err = os.Mkdir(target, 0o755)
	case mode.IsRegular():
		err = os.WriteFile(target, nil, 0o600)
	default:
		return fmt.Errorf("%s: source %s is a %s, which cannot be shared with a guest: %w", b.Field, b.Source, kind(mode), errdefs.ErrNotImplemented)
	}
	if err == nil {
		err = s.attach(tree, b, target)
	}
	if err != nil {
		return fmt.Errorf("%s: share %s: %w", b.Field, b.Source, err)
	}
	return nil
}

// Tmpfs tells whether a host path is on a tmpfs, and how many bytes that may hold.
func (s *Share) Tmpfs(b spec.Bind) (size uint64, yes bool, err error) {
	return Tmpfs(b, s.bundle, s.clone)
}

// Tmpfs does what Share's does, for a sandbox that has no share yet; see New.
func Tmpfs(b spec.Bind, bundle string, clone Clone) (size uint64, yes bool, err error) {
	if clone == nil {
		clone = cloneHere
	}
	tree, err := (&Share{bundle: bundle, clone: clone}).source(&b)
	if err != nil {
		return 0, false, err
	}
	defer tree.Close() //nolint:errcheck // a path only
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(tree.Fd()), &st); err != nil {
		return 0, false, fmt.Errorf("%s: source: %w", b.Field, &fs.PathError{Op: "statfs", Path: b.Source, Err: err})
	}
	return st.Blocks * uint64(st.Bsize), st.Type == unix.TMPFS_MAGIC, nil
}

// source clones the mount that a bind is of, and makes its path absolute.
func (s *Share) source(b *spec.Bind) (*os.File, error) {
	b.Source = s.absolute(b.Source)
	tree, err := s.clone(b.Source, b.Recursive)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: source %s does not exist on the host: %w", b.Field, b.Source, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: source: %w", b.Field, err)
	}
	return tree, nil
}

func (s *Share) absolute(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(s.bundle, path)
}

func kind(m fs.FileMode) string {
	switch {
	case m&fs.ModeSocket != 0:
		return "unix socket"
	case m&fs.ModeNamedPipe != 0:
		return "fifo"
	}
	return "device"
}

// attach makes a clone private, so that nothing which is mounted or unmounted
// below it reaches its origin or comes from there, and read-only where asked; and
// only then attaches it: the guest never sees it writable.
func (s *Share) attach(tree *os.File, b spec.Bind, target string) error {
	fd, flags := int(tree.Fd()), uint(unix.AT_EMPTY_PATH)
	if b.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	attr := &unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if b.ReadOnly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", flags, attr); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	s.mounted = append(s.mounted, target)
	return nil
}

// FileSystems returns the directories, relative to the container's, at which
// something is mounted, each after the one that it is below.
func (s *Share) FileSystems() ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.dir))
	if err != nil {
		return nil, fmt.Errorf("share: list what is mounted: %w", err)
	}
	var below []string
	for _, m := range mounts {
		rel, err := filepath.Rel(s.dir, m.Mountpoint)
		if err != nil {
			return nil, fmt.Errorf("share: %w", err)
		}
		below = append(below, rel)
	}
	slices.Sort(below)
	return slices.Compact(below), nil
}

// Close unmounts what was shared, the last first, and removes the container's
// directory; never what the mounts showed.
func (s *Share) Close() error {
	for i := len(s.mounted) - 1; i >= 0; i-- {
		err := unix.Unmount(s.mounted[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unshare %s: %w", s.mounted[i], err)
		}
	}
	s.mounted = nil
	if err := RemoveTree(s.dir); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	return nil
}
