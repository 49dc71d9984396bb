package dialer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/virtcontainers/cgroup"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

func TestMain(m *testing.M) {
	if Is(os.Args) {
		if err := Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func start(t *testing.T, o Options) *Dialer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("changes ids: needs root")
	}
	d, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 { // idempotent
			if err := d.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

// socket makes a socket with a name that no address could hold, in a directory that
// only root sees.
func socket(t *testing.T, mode os.FileMode) (*net.UnixListener, *os.File) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	path := filepath.Join(filepath.Dir(ln.Addr().String()), strings.Repeat("x", 200))
	if err := errors.Join(os.Rename(ln.Addr().String(), path), os.Chmod(path, mode), os.Chmod(filepath.Dir(path), 0o700)); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { ln.Close(); f.Close() })
	return ln, f
}

func dial(t *testing.T, d *Dialer, socket *os.File) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	conn, err := d.Dial(ctx, socket)
	if err == nil {
		conn.SetDeadline(time.Now().Add(limit))
		t.Cleanup(func() { conn.Close() })
	}
	return conn, err
}

func peer(t *testing.T, conn net.Conn) *unix.Ucred {
	t.Helper()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		t.Fatal(err, credErr)
	}
	return cred
}

// What a server sees of its peer is the process, which has the user's ids, no
// capability, and is where Enter has put it.
func TestPeerIsTheUserInItsCgroup(t *testing.T) {
	for _, o := range []Options{
		{},
		{UID: 65534, GID: 65533, Groups: []uint32{7, 65532}},
	} {
		path := fmt.Sprintf("/husk-test-dialer-%d", os.Getpid())
		if os.Geteuid() == 0 {
			group, err := cgroup.New(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			o.Enter = group.Add
			t.Cleanup(func() { // after the process has ended
				if err := group.Delete(context.Background()); err != nil {
					t.Error(err)
				}
			})
		}
		t.Run(fmt.Sprint(o.UID), func(t *testing.T) {
			d := start(t, o)
			ln, f := socket(t, 0o666)
			if _, err := dial(t, d, f); err != nil {
				t.Fatal(err)
			}
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			cred := peer(t, conn)
			if cred.Uid != o.UID || cred.Gid != o.GID || cred.Pid != int32(d.PID()) {
				t.Errorf("the server's peer is %+v, want pid %d, %d:%d", cred, d.PID(), o.UID, o.GID)
			}
			status := fields(t, cred.Pid, "status")
			groups := strings.Trim(fmt.Sprint(o.Groups), "[]")
			for key, want := range map[string]string{
				"Name": name, "CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
				"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Groups": groups,
			} {
				if status[key] != want {
					t.Errorf("%s: %q, want %q", key, status[key], want)
				}
			}
			cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(cgroups)) {
				if !strings.HasSuffix(strings.TrimSpace(line), ":"+path) {
					t.Errorf("cgroup %q, want %s", line, path)
				}
			}
			links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cred.Pid))
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range links {
				target, err := os.Readlink(link)
				ours := strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "pipe:") || strings.HasPrefix(target, "anon_inode:") || target == "/dev/null"
				if err == nil && !ours && !strings.HasPrefix(target, "/sys/fs/cgroup") { // the runtime reads its CPU limit
					t.Errorf("it holds %s", target)
				}
			}
		})
	}
}

func fields(t *testing.T, pid int32, file string) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(line, ":")
		m[key] = strings.TrimSpace(value)
	}
	return m
}

// The kernel checks the socket's mode against the user, root included.
func TestPermissionIsTheUsers(t *testing.T) {
	user, root := start(t, Options{UID: 65534, GID: 65534}), start(t, Options{})
	for _, c := range []struct {
		mode  os.FileMode
		owner int
		d     *Dialer
		want  error
	}{
		{0o600, 0, user, unix.EACCES},
		{0o555, 0, user, unix.EACCES},
		{0o602, 0, user, nil},
		{0o600, 65534, user, nil},
		{0o600, 0, root, nil},
		{0o600, 65534, root, unix.EACCES},
	} {
		_, f := socket(t, c.mode)
		if err := os.Chown(f.Name(), c.owner, c.owner); err != nil {
			t.Fatal(err)
		}
		if _, err := dial(t, c.d, f); !errors.Is(err, c.want) {
			t.Errorf("mode %o of %d by uid %s: %v, want %v", c.mode, c.owner, fields(t, int32(c.d.PID()), "status")["Uid"], err, c.want)
		}
	}
}

func TestConnectErrors(t *testing.T) {
	d := start(t, Options{UID: 65534, GID: 65534})
	ln, f := socket(t, 0o666)
	ln.Close()
	if _, err := dial(t, d, f); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	plain, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if err := plain.Chmod(0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, d, plain); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("no socket: %v", err)
	}
}

// Connections come out at once and whole, also where one server does not accept.
func TestManyConnections(t *testing.T) {
	d := start(t, Options{UID: 65534, GID: 65534})
	ln, f := socket(t, 0o666)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(conn, conn)
				conn.Close()
			}()
		}
	}()
	full, fullFile := socket(t, 0o666)
	raw, err := full.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { unix.Listen(int(fd), 0) })
	if _, err := dial(t, d, fullFile); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var stuck sync.WaitGroup
	stuck.Go(func() {
		if conn, err := d.Dial(ctx, fullFile); err == nil {
			conn.Close()
			t.Error("there was room in a full queue")
		} else if !errors.Is(err, context.Canceled) && !errors.Is(err, syscall.EAGAIN) {
			t.Errorf("a full queue: %v", err)
		}
	})
	var clients sync.WaitGroup
	for i := range 100 {
		clients.Go(func() {
			conn, err := d.Dial(t.Context(), f)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(limit))
			sent := bytes.Repeat([]byte{byte(i)}, 1000)
			conn.Write(sent)
			conn.(*net.UnixConn).CloseWrite()
			if got, err := io.ReadAll(conn); !slices.Equal(got, sent) || err != nil {
				t.Errorf("%d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	clients.Wait()
	cancel()
	stuck.Wait()
	if left, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.PID())); err != nil || len(left) > 20 {
		t.Errorf("it holds %d descriptors, %v", len(left), err)
	}
}

func TestDialAfterItsEnd(t *testing.T) {
	d := start(t, Options{})
	_, f := socket(t, 0o666)
	if err := unix.Kill(d.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 2 { // while the end is being noticed, and after it
		if _, err := dial(t, d, f); !errors.Is(err, ErrGone) {
			t.Errorf("after a SIGKILL: %v", err)
		}
		<-d.Done()
	}
}

// One that cannot be put where it belongs connects nowhere.
func TestNotEntered(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("changes ids: needs root")
	}
	lost := errors.New("no such cgroup")
	var pid int
	if _, err := Start(Options{Enter: func(p int) error { pid = p; return lost }}); !errors.Is(err, lost) {
		t.Errorf("Start: %v", err)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the process is left: %v", err)
	}
}
