package container

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// mounted tells whether something is mounted at dir.
func mounted(t *testing.T, dir string) bool {
	t.Helper()
	var here, above unix.Statx_t
	for path, st := range map[string]*unix.Statx_t{dir: &here, filepath.Dir(dir): &above} {
		if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, st); err != nil {
			t.Fatal(err)
		}
	}
	return here.Mnt_id != above.Mnt_id
}

func TestHeldFileSystemsAreUnmountedAtTheEnd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	var dirs []string
	for _, name := range []string{"rootfs", "rootfs/below"} {
		d := filepath.Join(dir, name)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("held", d, "tmpfs", 0, ""); err != nil {
			t.Skipf("mount: %v", err)
		}
		t.Cleanup(func() { unix.Unmount(d, unix.MNT_DETACH) }) //nolint:errcheck // as a rule it is not mounted any more
		dirs = append(dirs, d)
	}
	plain, file := filepath.Join(dir, "plain"), filepath.Join(dir, "file")
	if err := os.Mkdir(plain, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	held, err := hold(slices.Concat(dirs, []string{plain, file, filepath.Join(dir, "gone")}))
	if err != nil {
		t.Fatal(err)
	}
	if len(held) != 3 { // the directories
		t.Errorf("%d held", len(held))
	}
	if err := held.release(); err != nil {
		t.Fatal(err)
	}
	if mounted(t, dirs[0]) {
		t.Errorf("%s is still mounted", dirs[0])
	}
	if _, err := os.Stat(plain); err != nil {
		t.Error(err)
	}
}
