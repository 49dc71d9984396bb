// Package archive makes tar archives of what is in the guest, and files there of
// what archives hold.
package archive

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/beneath"
)

// Proc leads to what a descriptor is of, whatever has become of its name.
func Proc(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// openFile opens what fd, which may be of O_PATH, is of.
func openFile(fd, flags int) (*os.File, error) {
	return os.OpenFile(Proc(fd), flags|syscall.O_NONBLOCK, 0)
}

// At does something to what base is in dir, without following it.
func At(dir int, base string, do func(fd int) error) error {
	fd, err := beneath.Open(dir, base, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

// Readlink returns where the symlink base in dir leads; base is empty where dir is
// the symlink, by O_PATH.
func Readlink(dir int, base string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, base, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
