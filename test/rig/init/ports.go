package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// uevents is a netlink socket that the kernel tells of new devices.
type uevents int

func listenUevents() (uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return 0, fmt.Errorf("open uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return 0, fmt.Errorf("bind uevent socket: %w", err)
	}
	return uevents(fd), nil
}

// wait returns when the kernel has told something.
func (u uevents) wait() error {
	var b [4096]byte
	_, err := unix.Read(int(u), b[:])
	// ENOBUFS says that events were lost: so there were some.
	if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("read uevent: %w", err)
	}
	return nil
}

// openPort opens the port with a name for writing once it is there: the driver
// adds and names ports as the device announces them, after it was loaded.
func openPort(events uevents, name string) (*os.File, error) {
	for {
		port, err := findPort(name)
		if err != nil {
			return nil, err
		}
		if port != "" {
			return os.OpenFile(filepath.Join("/dev", port), os.O_WRONLY, 0)
		}
		if err := events.wait(); err != nil {
			return nil, err
		}
	}
}

// findPort returns which device has the name, or "".
func findPort(name string) (string, error) {
	const class = "/sys/class/virtio-ports"
	ports, err := os.ReadDir(class)
	if err != nil {
		return "", err
	}
	for _, port := range ports {
		b, err := os.ReadFile(filepath.Join(class, port.Name(), "name"))
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(b)) == name {
			return port.Name(), nil
		}
	}
	return "", nil
}
