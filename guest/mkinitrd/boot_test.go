package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/husk-containers/husk/guest/modules"
)

// TestBoot boots the host's cloud kernel with an initrd of ours, whose /init
// loads the listed modules and tells on the console what came of them.
func TestBoot(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("no QEMU for x86-64")
	}
	kernelRelease, err := modules.Newest("/lib/modules", "cloud")
	if err != nil {
		t.Skip(err)
	}
	kernel := "/boot/vmlinuz-" + kernelRelease
	if f, err := os.Open(kernel); err != nil {
		t.Skip(err)
	} else {
		f.Close()
	}

	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", init, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, out)
	}
	image := filepath.Join(dir, "initrd.img")
	if err := run(init, init, "/lib/modules", kernelRelease, image); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var console, stderr bytes.Buffer
	vm := exec.CommandContext(ctx, qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-m", "256M",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
		"-kernel", kernel, "-initrd", image, "-append", "console=ttyS0 quiet panic=-1")
	vm.Stdout, vm.Stderr = &console, &stderr
	if err := vm.Run(); err != nil {
		t.Fatalf("boot: %v\n%s\n%s", err, &stderr, &console)
	}
	for _, want := range []string{"virtiofs", "virtio_console", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_mem", "vmw_vsock_virtio_transport", "AF_VSOCK"} {
		if !strings.Contains(console.String(), "init: has "+want+"\r\n") {
			t.Errorf("guest has no %s; its console:\n%s", want, &console)
		}
	}
}
