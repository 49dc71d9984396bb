package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sources are mounts of what a spec binds from within a volume of the guest's own.
//
// Containers write in a volume, and so choose where its symbolic links lead. The OCI
// runtime would follow one out of the volume, to what is the guest's or another
// container's. So the agent finds the file, beneath the volume and nowhere else, and
// has the spec lead to a mount of that.
type sources []string

// openSources finds the sources of the spec's mounts, and mounts them in dir, which
// it makes. volumes is the directory of the volumes.
func openSources(dir, volumes string, spec *specs.Spec) (sources, error) {
	var s sources
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		below, ok := strings.CutPrefix(m.Source, volumes+"/")
		if !ok {
			continue
		}
		volume, file, ok := strings.Cut(below, "/")
		if !ok { // the volume itself, which is no link
			continue
		}
		target := filepath.Join(dir, strconv.Itoa(i))
		if err := mountBeneath(filepath.Join(volumes, volume), file, target); err != nil {
			err = fmt.Errorf("mount %s: find %q in volume %s: %w", m.Destination, file, volume, err)
			return nil, errors.Join(err, s.close())
		}
		s = append(s, target)
		m.Source = target
	}
	return s, nil
}

// mountBeneath mounts a file or directory beneath a directory on target.
func mountBeneath(dir, file, target string) error {
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return explainOpen(err)
	}
	defer root.Close()
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(int(root.Fd()), file, &how)
	if err != nil {
		return explainOpen(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.MkdirAll(target, 0o700)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o700); err == nil {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return err
	}
	tree, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// explainOpen says of a file that there is not, or is elsewhere, whose fault it is.
func explainOpen(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("no such file or directory: %w", errdefs.ErrNotFound)
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("a symbolic link leads out of the volume: %w", errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("symbolic links lead in a circle: %w", errdefs.ErrInvalidArgument)
	}
	return err
}

// close unmounts the sources: a container that has been made has mounts of its own.
func (s sources) close() error {
	var errs []error
	for _, target := range s {
		if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", target, err))
		}
	}
	return errors.Join(errs...)
}
