// Package beneath opens what is below a directory, and never anything else.
package beneath

import (
	"errors"

	"golang.org/x/sys/unix"
)

// maxAttempts bounds how often an open is begun anew that others' renames have
// spoilt.
const maxAttempts = 100

// Open opens name, a path below the directory dir, and follows no symlink in it:
// one there is ELOOP, but at the end O_PATH opens the symlink itself. Mounts are
// crossed. A path that would lead out is EXDEV. The descriptor closes on exec, and
// the opening of a FIFO does not block.
func Open(dir int, name string, flags int) (int, error) {
	return open(dir, name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

// OpenIn opens name as a process whose root is the directory root does: symlinks
// are followed, and absolute ones and ".." do not lead out of it.
func OpenIn(root int, name string, flags int) (int, error) {
	return open(root, name, flags|unix.O_NONBLOCK, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

func open(dir int, name string, flags int, resolve uint64) (int, error) {
	if flags&unix.O_PATH != 0 {
		flags &^= unix.O_NONBLOCK // openat2 refuses what O_PATH does not heed
	}
	how := &unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: resolve}
	for attempt := 1; ; attempt++ {
		fd, err := unix.Openat2(dir, name, how)
		if attempt < maxAttempts && (errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN)) {
			continue
		}
		return fd, err
	}
}
