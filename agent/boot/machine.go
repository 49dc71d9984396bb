package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Machine is the guest itself: what the agent does to it on the host's behalf.
type Machine struct{}

// SetHostname sets the guest's host name.
func (Machine) SetHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname %q: %w", name, err)
	}
	return nil
}

// SetClock sets the wall clock.
func (Machine) SetClock(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err == nil {
		err = unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
	}
	if err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// maxEntropy is the most that AddEntropy takes, in bytes.
const maxEntropy = 512

// AddEntropy credits b, at most 512 bytes, to the kernel's random pool.
func (Machine) AddEntropy(b []byte) error {
	if len(b) > maxEntropy {
		return fmt.Errorf("add entropy: %d bytes, at most %d", len(b), maxEntropy)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	info := struct { // struct rand_pool_info
		bits, bytes int32
		buf         [maxEntropy]byte
	}{bits: int32(8 * len(b)), bytes: int32(len(b))}
	copy(info.buf[:], b)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	return nil
}

// SetSysctl sets a kernel parameter, given as a/b/c or a.b.c.
func (Machine) SetSysctl(key, value string) error {
	if err := os.WriteFile(sysctlPath(key), []byte(value), 0); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = errors.New("this guest kernel has no such parameter")
		}
		return fmt.Errorf("set sysctl %s: %w", key, err)
	}
	return nil
}

// sysctlPath follows sysctl(8): whichever of '.' and '/' comes first separates,
// and with '.' as separator a '/' stands for a '.' in a name.
func sysctlPath(key string) string {
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		key = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	return filepath.Join("/proc/sys", key)
}

// MountShm mounts a /dev/shm for several containers, with room for so many bytes,
// on target, which is made.
func (Machine) MountShm(target string, bytes uint64) error {
	err := os.MkdirAll(target, 0o755)
	if err == nil {
		err = unix.Mount("shm", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", bytes))
	}
	if err != nil {
		return fmt.Errorf("mount shared memory of %d bytes on %s: %w", bytes, target, err)
	}
	return nil
}

// Sync writes what is cached to the disks. It gives up after timeout: a host
// that does not answer must not keep the guest from going down.
func (Machine) Sync(timeout time.Duration) {
	done := make(chan struct{})
	go func() { // ends with the machine at the latest
		unix.Sync()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(timeout):
	}
}

// PowerOff turns the guest off; it does not return. What is on its way to the
// console goes out first.
func PowerOff() {
	unix.IoctlSetInt(2, unix.TCSBRK, 1)          //nolint:errcheck // tcdrain; the console may be none
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) //nolint:errcheck // cannot fail for PID 1
	select {}
}
