package volume

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/sockets"
)

// fakeSockets tells of the sockets that containers get and lose.
type fakeSockets struct{ got, lost chan string }

func (f fakeSockets) Add(_ context.Context, s sockets.Socket) (string, func(context.Context) error, error) {
	f.got <- s.Path
	return "", func(context.Context) error { f.lost <- s.Path; return nil }, nil
}

func awaits(t *testing.T, paths chan string, want string) {
	t.Helper()
	select {
	case got := <-paths:
		if got != want {
			t.Errorf("socket %s, want %s", got, want)
		}
	case <-time.After(time.Minute):
		t.Fatalf("no socket, want %s", want)
	}
}

// inotifyInstances counts those of this process.
func inotifyInstances(t *testing.T) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if leads, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasSuffix(leads, "inotify") {
			n++
		}
	}
	return n
}

func listen(t *testing.T, path string) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// However many directories there are, they take one inotify instance of the host.
func TestSocketsInDirectories(t *testing.T) {
	h := newHost(t)
	fake := fakeSockets{make(chan string, 10), make(chan string, 10)}
	h.table.opts.Sockets = fake
	dirs := []string{h.TempDir(), h.TempDir(), h.TempDir()}
	here := filepath.Join(dirs[0], "here")
	listen(t, here)
	h.must(unix.Mknod(filepath.Join(dirs[1], "guest"), unix.S_IFSOCK|0o600, 0))
	before := inotifyInstances(t)
	var mounts []*Mount
	for _, dir := range dirs {
		m, _ := h.add(dir)
		mounts = append(mounts, m)
	}
	if n := inotifyInstances(t) - before; n != 1 {
		t.Errorf("%d inotify instances for %d directories", n, len(dirs))
	}
	awaits(t, fake.got, here)
	later := filepath.Join(dirs[2], "later")
	ln := listen(t, later)
	awaits(t, fake.got, later)
	ln.Close()
	awaits(t, fake.lost, later)
	h.release(mounts...)
	awaits(t, fake.lost, here)
	for range 2 {
		h.must(h.table.Close())
	}
	if n := inotifyInstances(t) - before; n != 0 {
		t.Errorf("%d inotify instances are left", n)
	}
}

// Files are shared though the host's sockets cannot be followed.
func TestDirectoriesWithoutInotify(t *testing.T) {
	h := newHost(t)
	var log bytes.Buffer
	h.table.opts.Log = slog.New(slog.NewTextHandler(&log, nil))
	h.must(h.table.Close()) // as if the host had no instance left
	m, path := h.add(h.source())
	if b, err := os.ReadFile(filepath.Join(h.seen(path), "f")); string(b) != "precious" || err != nil {
		t.Errorf("the guest sees %q, %v", b, err)
	}
	if !strings.Contains(log.String(), "out of reach") || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log:\n%s", log.String())
	}
	h.release(m)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
}
