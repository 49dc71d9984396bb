package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/husk-containers/husk/test/rig/job"
	"golang.org/x/sys/unix"
)

// A mountPoint is a file system and where it belongs.
type mountPoint struct {
	fstype, source, target string
	flags                  uintptr
	options                string
}

// mountAll makes each target where it is missing and mounts on it.
func mountAll(mounts ...mountPoint) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
		}
	}
	return nil
}

// loadModules loads the kernel modules in dir by order of their names.
func loadModules(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("load module %s: %w", e.Name(), err)
		}
	}
	return nil
}

// switchRoot puts the host's root, with a tmpfs that takes all writes over it,
// in the place of the initramfs, and the kernel's file systems into it.
func switchRoot() error {
	const root = "/newroot"
	err := mountAll(
		mountPoint{"virtiofs", job.RootTag, "/lower", unix.MS_RDONLY, ""},
		mountPoint{"tmpfs", "rw", "/rw", 0, "mode=755"},
	)
	if err != nil {
		return err
	}
	for _, dir := range []string{"/rw/upper", "/rw/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	err = mountAll(
		mountPoint{"overlay", "root", root, 0, "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"},
		mountPoint{"proc", "proc", root + "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		mountPoint{"sysfs", "sysfs", root + "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		mountPoint{"devtmpfs", "dev", root + "/dev", unix.MS_NOSUID, "mode=755"},
	)
	if err != nil {
		return err
	}
	// The initramfs cannot be left by pivot_root: the new root is moved over it.
	// PID 1 shares its root with the kernel's threads, so that the modprobe they
	// start is the new root's too.
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move %s to /: %w", root, err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	return os.Chdir("/")
}
