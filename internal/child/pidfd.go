package child

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StartTime reads when a process started, in clock ticks since boot: field 22
// of /proc/PID/stat. The error is fs.ErrNotExist when there is no such process.
func StartTime(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	stat, err := os.ReadFile(path)
	if errors.Is(err, unix.ESRCH) { // it went away after the open
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, fmt.Errorf("read start time of pid %d: %w", pid, err)
	}
	start, err := parseStartTime(string(stat))
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", path, err)
	}
	return start, nil
}

// parseStartTime counts fields from the last parenthesis: field 2, the name in
// parentheses, may hold anything.
func parseStartTime(stat string) (uint64, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	const first, startTime = 3, 22
	if len(fields) <= startTime-first {
		return 0, fmt.Errorf("%d fields after the name", len(fields))
	}
	return strconv.ParseUint(fields[startTime-first], 10, 64)
}

// KillRecorded kills a process that an earlier run has on record, and waits for
// its end. A process that has ended is no error, nor is another that has its pid
// now: that one, told by its start time, is left alone.
func KillRecorded(pid int, startTime uint64) error {
	if pid <= 1 || startTime == 0 {
		return fmt.Errorf("kill recorded process: pid %d with start time %d is no record of a child", pid, startTime)
	}
	// The pidfd first: if it is of another process than the start time, that is
	// because the recorded one has ended.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pidfd of pid %d: %w", pid, err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer pidfd.Close()
	now, err := StartTime(pid)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now != startTime {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill recorded process: %w", err)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill pid %d: %w", pid, err)
	}
	if err := waitPidfd(pidfd, killTimeout); err != nil {
		return fmt.Errorf("wait for the end of pid %d: %w", pid, err)
	}
	return nil
}

// waitPidfd returns when the process has ended, be it reaped or not: a pidfd is
// readable from then on.
func waitPidfd(pidfd *os.File, timeout time.Duration) error {
	if err := pidfd.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = conn.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		pollErr = err
		return n > 0 || err != nil
	})
	return errors.Join(err, pollErr)
}
