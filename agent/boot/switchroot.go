package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/module"
)

// Crun is the OCI runtime's binary, in the initramfs and afterwards.
const Crun = "/bin/crun"

const newRoot = "/newroot"

// switchRoot moves this process from the initramfs, where pivot_root is refused
// and so no container could start, to a tmpfs, and frees the initramfs. This
// program needs no copy: it runs on from the memory it is in.
func switchRoot() error {
	if err := os.Mkdir(newRoot, 0o755); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount("tmpfs", newRoot, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("switch root: mount tmpfs: %w", err)
	}
	if err := placeCrun(filepath.Join(newRoot, filepath.Dir(Crun))); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := placeModules(newRoot); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	for _, e := range entries {
		if p := "/" + e.Name(); p != newRoot && p != module.Dir {
			if err := os.RemoveAll(p); err != nil {
				return fmt.Errorf("switch root: free the initramfs: %w", err)
			}
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: move tmpfs: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: chroot: %w", err)
	}
	return os.Chdir("/")
}

// placeModules has the modules that may come to be needed, which stay in the
// initramfs, seen below root too, and the agent's program where the kernel calls it
// to load one: this program's file is as good as gone, but PID 1 leads to it.
func placeModules(root string) error {
	if _, err := os.Stat(module.Dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) { // an image without
			return nil
		}
		return err
	}
	dir := filepath.Join(root, module.Dir)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(module.Dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", module.Dir, err)
	}
	helper := filepath.Join(root, module.Helper)
	if err := os.MkdirAll(filepath.Dir(helper), 0o755); err != nil {
		return err
	}
	return os.Symlink("/proc/1/exe", helper)
}

// placeCrun puts crun into dir, on a read-only file system of its own. Crun
// guards its binary against the containers it runs (CVE-2019-5736): where it may
// be written to, crun copies itself into a sealed memory file at each call, which
// costs 110 ms and more under TCG. It takes a read-only ramfs for safe; not a
// tmpfs, which it takes for one of its own copies that is not sealed.
func placeCrun(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("ramfs", dir, "ramfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount ramfs: %w", err)
	}
	if err := copyFile(filepath.Join(dir, filepath.Base(Crun)), Crun); err != nil {
		return err
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make ramfs read-only: %w", err)
	}
	return nil
}

// copyFile copies an executable.
func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
