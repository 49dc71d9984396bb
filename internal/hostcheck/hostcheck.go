// Package hostcheck tells what a host lacks to boot a VM. Each error is one
// line that names the cause and, after a semicolon, the remedy.
package hostcheck

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"
)

func deviceOpens(path, remedy string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w; %s", path, cause(err), remedy)
	}
	return f.Close()
}

// LookupUser resolves the user that VMs run as, given by name or by uid. A uid
// without an account has a group of the same number. Root is refused.
func LookupUser(name string) (uid, gid uint32, err error) {
	const remedy = "set hypervisor.user to an unprivileged account"
	u, err := user.Lookup(name)
	if err != nil {
		n, numErr := strconv.ParseUint(name, 10, 32)
		if numErr != nil {
			return 0, 0, fmt.Errorf("user %q: no such account; %s", name, remedy)
		}
		if u, err = user.LookupId(name); err != nil {
			u = &user.User{Uid: strconv.FormatUint(n, 10), Gid: strconv.FormatUint(n, 10)}
		}
	}
	for _, id := range []struct {
		text string
		to   *uint32
	}{{u.Uid, &uid}, {u.Gid, &gid}} {
		n, err := strconv.ParseUint(id.text, 10, 32)
		if err != nil {
			return 0, 0, fmt.Errorf("user %q: parse id: %w", name, err)
		}
		*id.to = uint32(n)
	}
	if uid == 0 || gid == 0 {
		return 0, 0, fmt.Errorf("user %q: has uid %d and gid %d, and a VM never runs as root; %s", name, uid, gid, remedy)
	}
	return uid, gid, nil
}

// openImage opens a non-empty regular file without ever blocking, and returns
// its size in bytes.
func openImage(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, cause(err)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
		err = cause(err)
	case st.IsDir():
		err = errors.New("is a directory")
	case !st.Mode().IsRegular():
		err = errors.New("is not a regular file")
	case st.Size() == 0:
		err = errors.New("is empty")
	default:
		return f, st.Size(), nil
	}
	f.Close()
	return nil, 0, err
}

// CheckReadable returns nil where a process with these ids and no capabilities may
// read f, as far as the file's mode tells: an access control list is taken to
// allow it.
func CheckReadable(f *os.File, uid, gid uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("%q: %w", f.Name(), err)
	}
	bit := uint32(unix.S_IROTH)
	switch {
	case st.Uid == uid:
		bit = unix.S_IRUSR
	case st.Gid == gid:
		bit = unix.S_IRGRP
	}
	if _, err := unix.Fgetxattr(int(f.Fd()), "system.posix_acl_access", nil); err == nil || st.Mode&bit != 0 {
		return nil
	}
	return fmt.Errorf("%q has mode %#o and owner %d, and QEMU, which runs unprivileged, cannot read it; chmod a+r %[1]s, or set hypervisor.user to its owner",
		f.Name(), st.Mode&0o777, st.Uid)
}

// cause strips the operation and the path, which the caller names itself.
func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
