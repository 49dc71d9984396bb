// Command init is a guest's first process for the boot test: it loads the
// initrd's modules, says on the console what they brought, and ends the machine.
package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Printf("init: %v\n", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // QEMU runs with -no-reboot
}

func run() error {
	for _, m := range []struct{ fstype, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	list, err := os.ReadFile("/lib/modules/load")
	if err != nil {
		return err
	}
	for _, file := range strings.Fields(string(list)) {
		if err := load(file); err != nil {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	filesystems, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	if strings.Contains(string(filesystems), "\tvirtiofs\n") {
		fmt.Println("init: has virtiofs")
	}
	for _, driver := range []string{"virtio_console", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_mem", "vmw_vsock_virtio_transport"} {
		if _, err := os.Stat("/sys/bus/virtio/drivers/" + driver); err == nil {
			fmt.Println("init: has", driver)
		}
	}
	if fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0); err == nil {
		fmt.Println("init: has AF_VSOCK")
		_ = unix.Close(fd)
	}
	return nil
}

func load(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
