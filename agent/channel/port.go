package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// portName is what the host calls the port.
	portName = "husk.channel"
	// portsDir holds a directory per port, named as its device node is, with
	// the file "name".
	portsDir = "/sys/class/virtio-ports"
	// ueventSize is the longest uevent: UEVENT_BUFFER_SIZE and its header.
	ueventSize = 4096
)

// openPort opens the port and waits until the host has its end open too.
func openPort(ctx context.Context, node string) (io.ReadWriteCloser, error) {
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open virtio-serial port: %w", err)
	}
	if err := awaitHost(ctx, f); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the host on %s: %w", node, err), f.Close())
	}
	return f, nil
}

// findPort returns the device node of the port. The kernel announces a port when
// it is added and again when it has got its name.
func findPort(ctx context.Context) (string, error) {
	events, err := openUevents()
	if err != nil {
		return "", err
	}
	defer events.Close()                                                               //nolint:errcheck // read only
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) }) //nolint:errcheck // closed or done
	defer stop()
	buf := make([]byte, ueventSize)
	for {
		node, err := scanPorts(portsDir)
		if node != "" || err != nil {
			return node, err
		}
		for {
			n, err := events.Read(buf)
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			if errors.Is(err, unix.ENOBUFS) {
				break // events were lost: look
			}
			if err != nil {
				return "", fmt.Errorf("read uevents: %w", err)
			}
			if strings.Contains(string(buf[:n]), "\x00SUBSYSTEM=virtio-ports\x00") {
				break
			}
		}
	}
}

// scanPorts returns the device node of the port, or "" where there is none yet.
func scanPorts(dir string) (string, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*", "name"))
	if err != nil {
		return "", err
	}
	for _, name := range names {
		// A port may go while it is looked at.
		if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == portName {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(name))), nil
		}
	}
	return "", nil
}

// openUevents subscribes to the kernel's own device events.
func openUevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd) //nolint:errcheck // unused
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// awaitHost waits until the host has its end of the port open: until then every
// read is at EOF. The poll state of such a port is ready and hung up, so the
// edge is waited for that comes with each change.
func awaitHost(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) }) //nolint:errcheck // closed or done
	var pollErr error
	err = raw.Write(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		for {
			if _, pollErr = unix.Poll(fds, 0); pollErr != unix.EINTR {
				break
			}
		}
		return pollErr != nil || fds[0].Revents&unix.POLLHUP == 0
	})
	if !stop() && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(err, pollErr)
}
