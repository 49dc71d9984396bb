package hostns

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A mount that the host makes after the namespaces parted is seen through Clone.
func TestCloneSeesLaterMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes mounts: needs root")
	}
	file, err := os.Open("/proc/thread-self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	ns := New(file)
	defer ns.Close() //nolint:errcheck // read only
	source, target := t.TempDir(), t.TempDir()

	parted, mounted, result := make(chan error), make(chan struct{}), make(chan error)
	go func() { // in another namespace, on a thread that ends with it
		runtime.LockOSThread()
		parted <- errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		<-mounted
		result <- func() error {
			if _, err := os.Stat(filepath.Join(source, "file")); err == nil {
				return errors.New("the mount is seen without Clone: the test proves nothing")
			}
			tree, err := ns.Clone(source, true)
			if err != nil {
				return err
			}
			defer tree.Close() //nolint:errcheck // moved
			if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				return err
			}
			_, err = os.Stat(filepath.Join(target, "file"))
			return err
		}()
	}()
	if err := <-parted; err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", source, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(source, unix.MNT_DETACH) //nolint:errcheck // the test's own
	if err := os.WriteFile(filepath.Join(source, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	close(mounted)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if _, err := ns.Clone(filepath.Join(source, "missing"), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a path that is missing: %v", err)
	}
}
