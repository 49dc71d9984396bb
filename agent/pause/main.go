package pause

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// name is what ps shows of the process.
const name = "pause"

// Main is the whole life of the namespace's first process: it does nothing,
// until its standard input ends. The kernel gives it the orphans of its
// namespace and buries them, for it ignores SIGCHLD. It keeps its capabilities,
// so that none but a process with as many can trace it and leave its container
// that way; and the root of its file system is empty.
func Main() error {
	// No signal from within the namespace ends its first process but those that
	// this program would let end it.
	signal.Ignore()
	debug.SetGCPercent(-1) // there is no garbage
	if err := os.WriteFile("/proc/self/comm", []byte(name), 0); err != nil {
		return err
	}
	// With it all containers would go. Where that is not allowed it stands as others do.
	os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) //nolint:errcheck // see above
	if err := leaveRoot(); err != nil {
		return err
	}
	if _, err := os.Stdout.Write([]byte{0}); err != nil {
		return fmt.Errorf("tell that it is up: %w", err)
	}
	os.Stdout.Close()
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// leaveRoot makes an empty read-only directory the root of this process's own
// mount namespace, and all else in that unreachable.
func leaveRoot() error {
	const dir = "/tmp" // of which it is known that it is there
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "size=4096,mode=0555"); err != nil {
		return fmt.Errorf("mount an empty root: %w", err)
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil { // the old root is on top of the new
		return fmt.Errorf("change to an empty root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return os.Chdir("/")
}
