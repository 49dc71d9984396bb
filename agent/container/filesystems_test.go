package container

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

// mountAt mounts a tmpfs at a new directory.
func mountAt(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("held", dir, "tmpfs", 0, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) }) //nolint:errcheck // as a rule it is not mounted any more
}

func TestHeldFileSystemsAreUnmountedAtTheEnd(t *testing.T) {
	dir := t.TempDir()
	dirs := []string{filepath.Join(dir, "rootfs"), filepath.Join(dir, "rootfs/below")}
	for _, d := range dirs {
		mountAt(t, d)
	}
	plain, file := filepath.Join(dir, "plain"), filepath.Join(dir, "file")
	if err := os.Mkdir(plain, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFileSystems()
	held, err := f.hold(t.Context(), slices.Concat(dirs, []string{plain, file, filepath.Join(dir, "gone")}))
	if err != nil {
		t.Fatal(err)
	}
	if want := append(dirs, plain); !slices.Equal(held, want) {
		t.Errorf("held are %q, want %q", held, want)
	}
	if err := f.release(held); err != nil {
		t.Fatal(err)
	}
	if mounted(t, dirs[0]) {
		t.Errorf("%s is still mounted", dirs[0])
	}
	if _, err := os.Stat(plain); err != nil {
		t.Error(err)
	}
	if len(f.all) != 0 {
		t.Errorf("%d are remembered", len(f.all))
	}
}

func TestFileSystemOfSeveralIsUnmountedWithTheLast(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volume")
	mountAt(t, dir)
	f := newFileSystems()
	const users = 3
	for range users {
		if held, err := f.hold(t.Context(), []string{dir}); err != nil || len(held) != 1 {
			t.Fatal(held, err)
		}
	}
	for i := range users {
		if !mounted(t, dir) {
			t.Fatalf("unmounted with %d users", users-i)
		}
		if err := f.release([]string{dir}); err != nil {
			t.Fatal(err)
		}
	}
	if mounted(t, dir) {
		t.Error("still mounted")
	}
}

func TestHoldLetsGoOfAllOnError(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volume")
	mountAt(t, dir)
	f := newFileSystems()
	_, err := f.hold(t.Context(), []string{dir, filepath.Join(dir, strings.Repeat("long", 100))})
	if err == nil || !strings.Contains(err.Error(), "hold file system: ") {
		t.Errorf("error %v", err)
	}
	if mounted(t, dir) || len(f.all) != 0 {
		t.Error("it is held")
	}
}

// TestHoldMeetsRelease has the same directory held and let go of by many at once.
// As the kernel mounts a submount again for who walks in, there is a next file
// system below each that is unmounted.
func TestHoldMeetsRelease(t *testing.T) {
	const layers = 500
	dir := filepath.Join(t.TempDir(), "volume")
	for range layers {
		mountAt(t, dir)
	}
	f := newFileSystems()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				held, err := f.hold(t.Context(), []string{dir})
				if err != nil {
					t.Error(err)
					return
				}
				// Held, it is not unmounted by others' release: what is open is what is there.
				f.mu.Lock()
				file := f.all[dir].dir
				f.mu.Unlock()
				var open, there unix.Statx_t
				if err := errors.Join(
					unix.Statx(int(file.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &open),
					unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &there),
				); err != nil {
					t.Error(err)
				}
				if open.Mnt_id != there.Mnt_id {
					t.Error("held is what has been unmounted")
				}
				if err := f.release(held); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(f.all) != 0 {
		t.Errorf("%d are remembered", len(f.all))
	}
}

func TestHoldWaitsAsLongAsItsCallerDoes(t *testing.T) {
	f := newFileSystems()
	f.all["/volume"] = &fileSystem{users: 0, changing: make(chan struct{})} // being unmounted, for ever
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.hold(ctx, []string{"/volume"}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
