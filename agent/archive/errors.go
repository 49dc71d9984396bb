package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/containerd/errdefs"
)

// Failed says what could not be done to what, with the class of its cause. A path
// that the cause has is the agent's own and is left out.
func Failed(verb, name string, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("%s %q: %w", verb, name, err)
	}
	if class := classOf(errno); class != nil {
		return fmt.Errorf("%s %q: %w: %w", verb, name, errno, class)
	}
	return fmt.Errorf("%s %q: %w", verb, name, errno)
}

// classOf is what errdefs has for an errno, or nil.
func classOf(errno syscall.Errno) error {
	switch errno {
	case syscall.ENOSPC, syscall.EDQUOT, syscall.ENOMEM, syscall.EFBIG:
		return errdefs.ErrResourceExhausted
	case syscall.ENOENT, syscall.ESRCH:
		return errdefs.ErrNotFound
	case syscall.EEXIST, syscall.ENOTEMPTY:
		return errdefs.ErrAlreadyExists
	case syscall.EACCES, syscall.EPERM:
		return errdefs.ErrPermissionDenied
	case syscall.EROFS, syscall.ENOTDIR, syscall.EISDIR, syscall.EBUSY, syscall.ETXTBSY:
		return errdefs.ErrFailedPrecondition
	case syscall.EINVAL, syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EXDEV:
		return errdefs.ErrInvalidArgument
	}
	return nil
}

// Invalid is an error of class InvalidArgument.
func Invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// Broken is the error of an archive that cannot be read to its end.
func Broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the archive is broken off: %w", errdefs.ErrAborted)
	}
	if errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("read archive: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("read archive: %w", err)
}
