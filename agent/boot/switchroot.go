package boot

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
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
	if err := copyFile(filepath.Join(newRoot, Crun), Crun); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	for _, e := range entries {
		if p := "/" + e.Name(); p != newRoot {
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

// copyFile copies an executable.
func copyFile(to, from string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
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
