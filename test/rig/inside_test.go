package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// insideRig in the environment tells the test binary that it runs in the rig.
const insideRig = "HUSK_RIG_TEST_INSIDE"

// TestInside checks what the rig promises of its inside, from there. Test data
// is in /out.
func TestInside(t *testing.T) {
	if os.Getenv(insideRig) == "" {
		t.Skip("runs in the rig, started by TestHost")
	}
	t.Run("cgroup", func(t *testing.T) {
		const dir = "/sys/fs/cgroup/test"
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"cpu.max", "cpuset.cpus", "io.stat", "memory.max", "pids.max"} {
			if _, err := os.Stat(dir + "/" + name); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("vhost-vsock", claimCID)
	t.Run("vsock-loopback", loopbackVsock)
	t.Run("nested guest", func(t *testing.T) {
		out := command(t, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "q35", "-m", "256M",
			"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
			"-kernel", "/boot/vmlinuz-"+release(t), "-initrd", "/out/nested.cpio", "-append", "console=ttyS0 quiet panic=-1")
		if !strings.Contains(out, "nested guest runs") {
			t.Errorf("QEMU printed %q", out)
		}
	})
	t.Run("containerd", containerd)
}

// claimCID does what a VM monitor does to give its guest an address.
func claimCID(t *testing.T) {
	f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const vhostSetOwner, vhostVsockSetGuestCID = 0xaf01, 0x4008af60 // linux/vhost.h
	cid := uint64(1234)
	for _, call := range []struct {
		number uintptr
		arg    unsafe.Pointer
	}{{vhostSetOwner, nil}, {vhostVsockSetGuestCID, unsafe.Pointer(&cid)}} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), call.number, uintptr(call.arg)); errno != 0 {
			t.Errorf("ioctl %#x: %v", call.number, errno)
		}
	}
}

func loopbackVsock(t *testing.T) {
	listener, err := vsock.ListenContextID(vsock.Local, 1024, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := vsock.Dial(vsock.Local, 1024, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); string(got) != "hello" || err != nil {
		t.Errorf("server read %q, %v", got, err)
	}
}

// containerd runs a container by runc on overlayfs, the way others do whose
// tests run here.
func containerd(t *testing.T) {
	const config = `
version = 2
root = "/scratch/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
`
	file := t.TempDir() + "/config.toml"
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("containerd", "-c", file)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer daemon.Wait() //nolint:errcheck // killed
	defer daemon.Process.Kill()
	const address = "--connect-timeout=1m" // ctr waits for the socket
	if out := command(t, "ctr", address, "version"); !strings.Contains(out, "Server:") {
		t.Errorf("ctr version printed %q", out)
	}
	if out := command(t, "ctr", address, "plugins", "ls"); !strings.Contains(fmt.Sprint(strings.Fields(out)), "overlayfs linux/amd64 ok") {
		t.Errorf("the overlayfs snapshotter is not there:\n%s", out)
	}
	command(t, "/bin/sh", "-c", "mkdir -p /scratch/rootfs/bin && cp /bin/busybox /scratch/rootfs/bin/")
	if out := command(t, "ctr", address, "run", "--rm", "--rootfs", "/scratch/rootfs", "c", "/bin/busybox", "echo", "hello"); out != "hello\n" {
		t.Errorf("container printed %q", out)
	}
}

func release(t *testing.T) string {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(name.Release[:])
}

// command runs a program and returns what it printed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	start := time.Now()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	t.Logf("%s took %v", name, time.Since(start).Round(time.Millisecond))
	return string(out)
}
