package socket

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// shared runs a test in a mount namespace of its own, with a file system that
// stands for the one which the host shares, mounted at the directory it is given.
func shared(t *testing.T, test func(share string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes mounts: needs root")
	}
	share := t.TempDir()
	done := make(chan error)
	go func() { // on a thread that ends with it
		runtime.LockOSThread()
		err := errors.Join(
			unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("tmpfs", share, "tmpfs", 0, ""),
		)
		if err == nil {
			test(share)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// dead makes a socket that nobody listens on, as the host's is in the guest.
func dead(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Error(err)
		return
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

func isMounted(t *testing.T, path string) bool {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st); err != nil {
		t.Error(err)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

func TestOverTheHostsSocket(t *testing.T) {
	shared(t, func(share string) {
		g := newGuest(t)
		over := filepath.Join(share, "x.sock")
		dead(t, over)
		if _, err := net.Dial("unix", over); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the host's own: %v", err)
		}
		s := Socket{ID: "a", Mode: 0o777, Over: over}
		for range 3 { // only once
			if err := g.Listen(s); err != nil {
				t.Error(err)
				return
			}
			conn, err := net.Dial("unix", over)
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
			g.next()
		}
		// It is replaced on the host.
		if err := unix.Unmount(over, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if isMounted(t, over) {
			t.Error("mounts lie one over another")
		}
		os.Remove(over)
		if err := g.Listen(s); !errdefs.IsNotFound(err) {
			t.Errorf("while it is gone: %v", err)
		}
		if _, err := os.Lstat(over); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("something was made in its place: %v", err)
		}
		dead(t, over)
		if err := g.Listen(s); err != nil {
			t.Error(err)
		}
		// Another takes its place, and its end does not take that one's away.
		if err := errors.Join(g.Listen(Socket{ID: "b", Mode: 0o777, Over: over}), g.Close("a")); err != nil {
			t.Error(err)
		}
		if conn, err := net.Dial("unix", over); err != nil {
			t.Error(err)
		} else if conn.Close(); g.next().Socket != "b" {
			t.Error("the first is in the way")
		}
		if err := g.Close("b"); err != nil {
			t.Error(err)
		}
		if isMounted(t, over) {
			t.Error("the mount is left")
		}
	})
}

// Who can write in the shared directory cannot have the agent mount elsewhere.
func TestOverFollowsNoSymbolicLink(t *testing.T) {
	shared(t, func(share string) {
		g := newGuest(t)
		victim := filepath.Join(share, "victim.sock")
		dead(t, victim)
		if err := errors.Join(os.Symlink(victim, filepath.Join(share, "link")), os.Symlink(share, filepath.Join(share, "dir")),
			os.WriteFile(filepath.Join(share, "file"), nil, 0o600)); err != nil {
			t.Error(err)
			return
		}
		for _, name := range []string{"link", "dir/victim.sock", "file", "missing", "missing/x", "file/x"} {
			if err := g.Listen(Socket{ID: "a", Over: filepath.Join(share, name)}); err == nil {
				t.Errorf("mounted over %s", name)
			}
			if entries, err := os.ReadDir(g.dir); err != nil || len(entries) > 0 {
				t.Errorf("%s: left: %v, %v", name, entries, err)
			}
		}
		if isMounted(t, victim) {
			t.Error("a mount is over what a link led to")
		}
	})
}
