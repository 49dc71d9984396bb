package hotplug

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// uevents are what the kernel tells of devices.
type uevents struct{ socket *os.File }

func openUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open uevents: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open uevents: %w", err)
	}
	return &uevents{os.NewFile(uintptr(fd), "uevents")}, nil
}

func (u *uevents) Close() error { return u.socket.Close() }

// next waits until the kernel has told of a CPU or of memory, or until then, which may
// be zero, or until ctx ends.
func (u *uevents) next(ctx context.Context, then time.Time) error {
	u.socket.SetReadDeadline(then) //nolint:errcheck // it can be polled
	defer context.AfterFunc(ctx, func() { u.socket.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 16<<10)
	for {
		n, err := u.socket.Read(buf)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENOBUFS): // some were lost: look
			return nil
		case err != nil:
			return fmt.Errorf("read uevents: %w", err)
		}
		for field := range bytes.SplitSeq(buf[:n], []byte{0}) {
			if s := string(field); s == "SUBSYSTEM=cpu" || s == "SUBSYSTEM=memory" {
				return nil
			}
		}
	}
}

// watch calls changed whenever the kernel tells of a CPU or of memory that has come,
// gone, or gone into or out of use, until ctx ends.
func watch(ctx context.Context, changed func()) error {
	u, err := openUevents()
	if err != nil {
		return err
	}
	defer u.Close()
	for {
		if err := u.next(ctx, time.Time{}); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		changed()
	}
}
