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
			if err != nil {
				return err
			}
			opened, err := ns.Open(filepath.Join(source, "file"))
			if err != nil {
				return err
			}
			return opened.Close()
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

func TestOpenFollowsNoSymbolicLink(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("enters a mount namespace: needs root")
	}
	file, err := os.Open("/proc/thread-self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	ns := New(file)
	defer ns.Close() //nolint:errcheck // read only
	for name, ns := range map[string]*Namespace{"given": ns, "own": nil} {
		t.Run(name, func(t *testing.T) { opens(t, ns) })
	}
}

func opens(t *testing.T, ns *Namespace) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "dir", "file")
	if err := errors.Join(os.Mkdir(filepath.Dir(target), 0o700), os.WriteFile(target, nil, 0o600),
		os.Symlink("dir", filepath.Join(dir, "way")), os.Symlink("file", filepath.Join(dir, "dir", "end"))); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{target, filepath.Join(dir, "way/file"), filepath.Join(dir, "way/end")} {
		if got, err := ns.Resolve(path); got != target || err != nil {
			t.Errorf("Resolve(%s) = %s, %v", path, got, err)
		}
		opened, err := ns.Open(path)
		if path == target && err == nil {
			opened.Close()
			continue
		}
		if !errors.Is(err, unix.ELOOP) {
			t.Errorf("Open(%s): %v", path, err)
		}
	}
	for _, err := range []error{func() error { _, err := ns.Open(dir + "/missing"); return err }(), func() error { _, err := ns.Resolve(dir + "/missing"); return err }()} {
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a path that is missing: %v", err)
		}
	}
}
