package virtiofs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// timeout is far above what anything here takes.
const timeout = 20 * time.Second

// script writes a program that stands for virtiofsd.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "virtiofsd")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStartRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		opts Options
		want string
		is   func(error) bool
	}{
		"relative directory": {Options{Dir: "a"}, `share "a" by virtio-fs: directory is not absolute`, errdefs.IsInvalidArgument},
		"no directory":       {Options{Dir: dir + "/none"}, "no such file or directory", nil},
		"a file":             {Options{Dir: file}, "not a directory", errdefs.IsInvalidArgument},
		"cache mode":         {Options{Dir: dir, Cache: "some"}, `cache mode "some" is not auto, always or never`, errdefs.IsInvalidArgument},
		"pool size":          {Options{Dir: dir, ThreadPoolSize: -1}, "thread pool size -1 is negative", errdefs.IsInvalidArgument},
		"no virtiofsd":       {Options{Dir: dir, Path: dir + "/virtiofsd"}, "install virtiofsd", errdefs.IsNotFound},
		"not executable":     {Options{Dir: dir, Path: file}, "permission denied", nil},
		"fails":              {Options{Dir: dir, Path: script(t, "exit 3")}, "--version: exit status 3", nil},
		"too old":            {Options{Dir: dir, Path: script(t, "echo virtiofsd 1.2.0")}, "too old: 1.5 or later is needed: install virtiofsd", nil},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := Start(t.Context(), tt.opts)
			if err == nil {
				_ = d.Stop(t.Context())
				t.Fatal("Start succeeded")
			}
			if !strings.Contains(err.Error(), tt.want) || tt.is != nil && !tt.is(err) {
				t.Errorf("error = %v, want it to hold %q", err, tt.want)
			}
		})
	}
}

func TestFind(t *testing.T) {
	path, err := Find()
	if err != nil && (!errdefs.IsNotFound(err) || !strings.Contains(err.Error(), remedy)) {
		t.Errorf("error = %v", err)
	}
	if err == nil {
		if _, err := Probe(t.Context(), path); err != nil {
			t.Error(err)
		}
	}
}

func TestConnectLeavesNothing(t *testing.T) {
	// Longer than the 108 bytes of a socket's address.
	parent := filepath.Join(t.TempDir(), strings.Repeat("long", 50))
	if err := os.Mkdir(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, client, err := connect(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	defer client.Close()
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %v, %v", parent, left, err)
	}
	fd, _, err := unix.Accept(int(listener.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	server := os.NewFile(uintptr(fd), "server")
	if _, err := io.WriteString(client, "hello"); err != nil {
		t.Fatal(err)
	}
	client.Close()
	if got, err := io.ReadAll(server); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
	server.Close()
}

// needDaemon skips where the real one cannot run.
func needDaemon(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("virtiofsd's sandbox needs root")
	}
	if _, err := Find(); err != nil {
		t.Skip(err)
	}
}

func serve(t *testing.T, opts Options) *Daemon {
	t.Helper()
	d, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := handshake(d); err != nil {
		t.Fatal(err)
	}
	return d
}

// handshake asks for the vhost-user features: the answer comes when the daemon
// has its sandbox.
func handshake(d *Daemon) error {
	conn, err := net.FileConn(d.Socket())
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(timeout))
	const getFeatures, version1, reply = 1, 1, 4
	request := binary.LittleEndian.AppendUint32(nil, getFeatures)
	request = binary.LittleEndian.AppendUint32(request, version1)
	request = binary.LittleEndian.AppendUint32(request, 0) // bytes that follow
	if _, err := conn.Write(request); err != nil {
		return err
	}
	answer := make([]byte, 12+8)
	if _, err := io.ReadFull(conn, answer); err != nil {
		select {
		case <-d.Done():
			return d.Err()
		case <-time.After(timeout):
			return fmt.Errorf("read features: %w", err)
		}
	}
	if got := binary.LittleEndian.Uint32(answer[4:]); got != version1|reply {
		return fmt.Errorf("flags of the answer = %#x", got)
	}
	if binary.LittleEndian.Uint64(answer[12:]) == 0 {
		return errors.New("no features")
	}
	return nil
}

// sandboxed is the pid of the daemon's only child.
func sandboxed(t *testing.T, d *Daemon) int {
	t.Helper()
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(list)))
	if err != nil {
		t.Fatalf("children of virtiofsd = %q, want one", list)
	}
	return pid
}

// openPidfd is for waitEnd.
func openPidfd(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func waitEnd(t *testing.T, pidfd int) {
	t.Helper()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(timeout.Milliseconds()))
	if n != 1 || err != nil {
		t.Errorf("process has not ended: %d, %v", n, err)
	}
}

func wait(t *testing.T, d *Daemon) {
	t.Helper()
	select {
	case <-d.Done():
	case <-time.After(timeout):
		t.Fatal("virtiofsd has not ended")
	}
}

func TestDaemonServes(t *testing.T) {
	needDaemon(t)
	dir := filepath.Join(t.TempDir(), `odd, no_xattr\ name`)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	var started []string
	d := serve(t, Options{Dir: dir, Started: func(name string, pid int) error {
		started = append(started, fmt.Sprint(name, " ", pid))
		return nil
	}})
	if want := fmt.Sprint("virtiofsd ", d.PID()); len(started) != 1 || started[0] != want {
		t.Errorf("Started was called with %q, want %q", started, want)
	}
	inner := sandboxed(t, d)
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/file", inner)); err != nil {
		t.Errorf("the directory is not the daemon's root: %v", err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", inner))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status of the daemon lacks %q", want)
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", inner))
	if err != nil {
		t.Fatal(err)
	}
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		t.Fatal(err)
	}
	want := strconv.FormatUint(min(own.Max, maxFiles), 10)
	for line := range strings.Lines(string(limits)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max open files") && (f[3] != want || f[4] != want) {
			t.Errorf("limits = %q, want %s", line, want)
		}
	}
	pidfd := openPidfd(t, inner)
	for range 2 {
		if err := d.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	waitEnd(t, pidfd)
	if err := d.Err(); err != nil {
		t.Errorf("Err after Stop = %v", err)
	}
}

// However a part of the daemon ends, all of it ends and Err says so.
func TestDaemonEnds(t *testing.T) {
	needDaemon(t)
	for name, end := range map[string]func(t *testing.T, d *Daemon, inner int) error{
		"daemon killed":  func(_ *testing.T, d *Daemon, _ int) error { return unix.Kill(d.PID(), unix.SIGKILL) },
		"sandbox killed": func(_ *testing.T, _ *Daemon, inner int) error { return unix.Kill(inner, unix.SIGKILL) },
		"socket closed":  func(_ *testing.T, d *Daemon, _ int) error { return d.Socket().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			d := serve(t, Options{Dir: t.TempDir()})
			inner := sandboxed(t, d)
			outerFD, innerFD := openPidfd(t, d.PID()), openPidfd(t, inner)
			if err := end(t, d, inner); err != nil {
				t.Fatal(err)
			}
			wait(t, d)
			waitEnd(t, outerFD)
			waitEnd(t, innerFD)
			if err := d.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			if err := d.Err(); err == nil || errors.Is(err, hypervisor.ErrKilled) != (name != "socket closed") || !strings.HasPrefix(err.Error(), "virtiofsd ended: ") {
				t.Errorf("Err = %v", err)
			} else {
				t.Log(err)
			}
		})
	}
}

func TestStartedErrorStopsDaemon(t *testing.T) {
	needDaemon(t)
	refused := errors.New("no record")
	var pidfd int
	_, err := Start(t.Context(), Options{Dir: t.TempDir(), Started: func(_ string, pid int) error {
		pidfd = openPidfd(t, pid)
		return refused
	}})
	if !errors.Is(err, refused) {
		t.Errorf("error = %v", err)
	}
	waitEnd(t, pidfd)
}

// A daemon that cannot start says why in one line.
func TestErrHoldsLastWords(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a pid namespace needs root")
	}
	path := script(t, `[ "$1" = --version ] && echo virtiofsd 1.13.2 && exit; echo first >&2; echo "no such thing" >&2; exit 1`)
	d, err := Start(t.Context(), Options{Path: path, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	wait(t, d)
	if got, want := fmt.Sprint(d.Err()), "virtiofsd ended: exit status 1: first; no such thing"; got != want {
		t.Errorf("Err = %q, want %q", got, want)
	}
	_ = d.Stop(t.Context())
}

const inNamespaceEnv = "HUSK_TEST_VIRTIOFS_IN_NAMESPACE"

// TestSeesLaterMounts runs itself again in a mount namespace of its own.
func TestSeesLaterMounts(t *testing.T) {
	needDaemon(t)
	if os.Getenv(inNamespaceEnv) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestSeesLaterMounts$", "-test.v")
		cmd.Env = append(os.Environ(), inNamespaceEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if output, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, output)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	below := filepath.Join(dir, "container", "rootfs")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	d := serve(t, Options{Dir: dir})
	seen := fmt.Sprintf("/proc/%d/root/container/rootfs/file", sandboxed(t, d))
	if err := unix.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(below, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(seen); err != nil {
		t.Errorf("a later mount is not seen: %v", err)
	}
	if err := unix.Unmount(below, 0); err != nil {
		t.Fatalf("the daemon pins the mount: %v", err)
	}
	if _, err := os.Stat(seen); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a later unmount is not seen: %v", err)
	}
}
