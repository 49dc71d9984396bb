package usernet

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
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
const timeout = 30 * time.Second

// script writes a program that stands for passt.
func script(t *testing.T, body string) string {
	t.Helper()
	dir := t.TempDir()
	// Its user must get there.
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "passt")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a pid namespace and another uid need root")
	}
}

// needPasst skips where the real one cannot run.
func needPasst(t *testing.T) {
	t.Helper()
	needRoot(t)
	if _, err := Find(); err != nil {
		t.Skip(err)
	}
}

func serve(t *testing.T, opts Options) *Network {
	t.Helper()
	opts.MAC = testMAC
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	n, err := Start(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

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

func TestStartRefuses(t *testing.T) {
	none := filepath.Join(t.TempDir(), "passt")
	for name, tt := range map[string]struct {
		opts Options
		want string
		is   func(error) bool
	}{
		"no MAC":        {Options{}, `MAC address "" is not a unicast one`, errdefs.IsInvalidArgument},
		"long MAC":      {Options{MAC: make(net.HardwareAddr, 8)}, "is not a unicast one", errdefs.IsInvalidArgument},
		"multicast MAC": {Options{MAC: net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}}, "01:00:5e:00:00:01", errdefs.IsInvalidArgument},
		"passt's MAC":   {Options{MAC: net.HardwareAddr{0x0a, 0x68, 0x75, 0x73, 0x6b, 1}}, "or is passt's", errdefs.IsInvalidArgument},
		"small MTU":     {Options{MAC: testMAC, MTU: 1279}, "MTU 1279 is not from 1280 to 65520", errdefs.IsInvalidArgument},
		"large MTU":     {Options{MAC: testMAC, MTU: 65521}, "MTU 65521 is not from", errdefs.IsInvalidArgument},
		"no passt":      {Options{MAC: testMAC, Passt: none}, "run " + none + ": not found: install passt", errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := Start(t.Context(), tt.opts)
			if err == nil {
				_ = n.Close(t.Context())
				t.Fatal("Start succeeded")
			}
			if !strings.HasPrefix(err.Error(), "start user-mode networking: ") || !strings.Contains(err.Error(), tt.want) || !tt.is(err) {
				t.Errorf("error = %v, want it to hold %q", err, tt.want)
			}
		})
	}
}

func TestFind(t *testing.T) {
	if _, err := Find(); err != nil && (!errdefs.IsNotFound(err) || !strings.Contains(err.Error(), remedy)) {
		t.Errorf("error = %v", err)
	}
}

// What passt says of why it does not start is Start's error.
func TestStartHoldsLastWords(t *testing.T) {
	needRoot(t)
	for name, tt := range map[string]struct{ body, want string }{
		"says why":         {"echo first >&2; echo 'no such thing' >&2; exit 1", "passt ended: exit status 1: first; no such thing"},
		"says nothing":     {"exit 0", "passt ended: exit status 0"},
		"hangs up":         {"exec sleep 60 3>&-", " passt: "},
		"no frames":        {"printf '\\377\\377\\377\\377' >&3; sleep 60", "read from passt: a frame of 4294967295 bytes"},
		"frames, then end": {"printf '\\0\\0\\0\\2ab\\0\\0\\0\\4c' >&3; exit 2", "passt ended: exit status 2"},
	} {
		t.Run(name, func(t *testing.T) {
			pid := 0
			_, err := Start(t.Context(), Options{MAC: testMAC, Passt: script(t, tt.body), Started: func(p hypervisor.Process) error {
				pid = p.PID
				return nil
			}})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want it to hold %q", err, tt.want)
			}
			if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("the process is left: %v", err)
			}
		})
	}
}

func TestStartedErrorStopsPasst(t *testing.T) {
	needPasst(t)
	refused := errors.New("no record")
	var pidfd int
	_, err := Start(t.Context(), Options{MAC: testMAC, Started: func(p hypervisor.Process) error {
		pidfd = openPidfd(t, p.PID)
		return refused
	}})
	if !errors.Is(err, refused) {
		t.Errorf("error = %v", err)
	}
	waitEnd(t, pidfd)
}

func TestStartIsGivenUp(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	var pidfd int
	_, err := Start(ctx, Options{MAC: testMAC, Passt: script(t, "exec sleep 60"), Started: func(p hypervisor.Process) error {
		pidfd = openPidfd(t, p.PID)
		time.AfterFunc(50*time.Millisecond, func() { cancel(enough) })
		return nil
	}})
	if !errors.Is(err, enough) {
		t.Errorf("error = %v", err)
	}
	waitEnd(t, pidfd)
}

func TestPasstIsConfined(t *testing.T) {
	needPasst(t)
	var started []hypervisor.Process
	n := serve(t, Options{MTU: 9000, Started: func(p hypervisor.Process) error {
		started = append(started, p)
		return nil
	}})
	if want := (hypervisor.Process{Name: "passt", PID: n.child.PID()}); len(started) != 1 || started[0] != want {
		t.Errorf("Started was called with %v, want %v", started, want)
	}
	if nic := n.NIC(); nic.MTU != 9000 || !bytes.Equal(nic.MAC, testMAC) || nic.Stream == nil || nic.ID == "" {
		t.Errorf("NIC = %+v", nic)
	}
	proc := fmt.Sprintf("/proc/%d/", n.child.PID())
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65534\t65534\t65534\t65534\n", "Groups:\t \n",
		"CapEff:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status of passt lacks %q:\n%s", want, status)
		}
	}
	if files, err := os.ReadDir(proc + "root"); err != nil || len(files) > 0 {
		t.Errorf("passt's root has %v, %v", files, err)
	}
	for _, ns := range []struct {
		name string
		own  bool
	}{{"net", false}, {"user", true}, {"mnt", true}, {"ipc", true}, {"pid", true}} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns.name)
		its, err2 := os.Readlink(proc + "ns/" + ns.name)
		if err := errors.Join(err1, err2); err != nil || (ours != its) != ns.own {
			t.Errorf("%s namespaces: ours %s, passt's %s, %v", ns.name, ours, its, err)
		}
	}
	pidfd := openPidfd(t, n.child.PID())
	for range 2 {
		if err := n.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	waitEnd(t, pidfd)
	if err := n.Err(); err != nil {
		t.Errorf("Err after Close = %v", err)
	}
}

// However passt ends, Err says so within two seconds.
func TestPasstEnds(t *testing.T) {
	needPasst(t)
	for name, tt := range map[string]struct {
		end    func(*Network) error
		killed bool
		want   string
	}{
		"killed":      {func(n *Network) error { return unix.Kill(n.child.PID(), unix.SIGKILL) }, true, "passt ended: killed by SIGKILL"},
		"terminated":  {func(n *Network) error { return unix.Kill(n.child.PID(), unix.SIGTERM) }, false, "passt ended: exit status 0"},
		"guest's end": {func(n *Network) error { return n.NIC().Stream.Close() }, false, "passt ended: exit status 0"},
	} {
		t.Run(name, func(t *testing.T) {
			n := serve(t, Options{})
			if err := tt.end(n); err != nil {
				t.Fatal(err)
			}
			select {
			case <-n.Done():
			case <-time.After(2 * time.Second):
				t.Fatal("passt has not ended")
			}
			if err := n.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if err := n.Err(); err == nil || !strings.HasPrefix(err.Error(), tt.want) || n.Killed() != tt.killed {
				t.Errorf("Err = %v, killed %v", err, n.Killed())
			} else {
				t.Log(err)
			}
		})
	}
}

// again runs the calling test in a process of its own, which env tells.
func again(t *testing.T, attr *syscall.SysProcAttr) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), againEnv+"=1")
	attr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr = attr
	return cmd
}

const againEnv = "HUSK_TEST_USERNET_AGAIN"

// A passt whose starter is killed is killed by the kernel. It is stopped, so that
// it cannot end of itself when it sees that its socket is closed.
func TestPasstDiesWithItsParent(t *testing.T) {
	needPasst(t)
	if os.Getenv(againEnv) != "" {
		n := serve(t, Options{})
		fmt.Printf("\npid %d\n", n.child.PID())
		select {}
	}
	cmd := again(t, &syscall.SysProcAttr{})
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	for lines := bufio.NewScanner(stdout); pid == 0 && lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "pid "); ok {
			if pid, err = strconv.Atoi(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if pid == 0 {
		t.Fatalf("no pid was printed: %v", cmd.Wait())
	}
	pidfd := openPidfd(t, pid)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGSTOP, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	waitEnd(t, pidfd)
}
