package beneath

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"d/e", "real"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, leads := range map[string]string{"d/up": "..", "d/abs": "/real", "d/e/out": "../../../..", "d/here": "e", "d/loop": "loop"} {
		if err := os.Symlink(leads, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(root+"/d/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	top, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(top)
	d, err := Open(top, "d", unix.O_PATH)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(d)

	const dir = unix.O_PATH | unix.O_DIRECTORY
	for _, c := range []struct {
		name  string
		flags int
		want  error
	}{
		{"e", dir, nil},
		{".", dir, nil},
		{"fifo", unix.O_RDONLY, nil}, // without a writer
		{"up", unix.O_PATH, nil},     // the symlink itself
		{"up", unix.O_RDONLY, unix.ELOOP},
		{"up", dir, unix.ENOTDIR},
		{"here/x", dir, unix.ELOOP},
		{"e/out", unix.O_PATH, nil}, // likewise
		{"e/out/x", unix.O_PATH, unix.ELOOP},
		{"..", dir, unix.EXDEV},
		{"e/../..", dir, unix.EXDEV},
		{"/", dir, unix.EXDEV},
		{"e/" + strings.Repeat("x", 256), dir, unix.ENAMETOOLONG},
	} {
		fd, err := Open(d, c.name, c.flags)
		if !errors.Is(err, c.want) {
			t.Errorf("Open %q %#x: %v, want %v", c.name, c.flags, err, c.want)
		}
		if err == nil {
			unix.Close(fd)
		}
	}

	// The root of what OpenIn opens is its own.
	for name, want := range map[string]string{
		"/": root, "/d/up": root, "/d/abs": root + "/real", "/d/e/out": root, "d/up/../../real": root + "/real", "/d/here": root + "/d/e",
	} {
		fd, err := OpenIn(top, name, dir)
		if err != nil {
			t.Errorf("OpenIn %q: %v", name, err)
			continue
		}
		var got, expected unix.Stat_t
		if err := errors.Join(unix.Fstat(fd, &got), unix.Stat(want, &expected)); err != nil || got.Ino != expected.Ino {
			t.Errorf("OpenIn %q is inode %d, %v, want %s, %d", name, got.Ino, err, want, expected.Ino)
		}
		unix.Close(fd)
	}
	if _, err := OpenIn(top, "/d/loop", dir); !errors.Is(err, unix.ELOOP) {
		t.Errorf("OpenIn of a loop: %v", err)
	}
}
