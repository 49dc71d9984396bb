package reap

import (
	"context"
	"os"
	"os/signal"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Collect reaps orphans until ctx ends. Only a program that is PID 1 or a child
// subreaper, and starts every process through one Table, may run it.
func (t *Table) Collect(ctx context.Context) {
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	defer signal.Stop(sigchld)
	for {
		for t.collectOne() {
		}
		select {
		case <-ctx.Done():
			return
		case <-sigchld:
		case <-t.poke:
		}
	}
}

// collectOne reaps one orphan if it can; false: there is none, or a start is
// under way, or the kernel shows an owned process first. Of the last two the
// end wakes Collect. The lock is held across system calls that do not block.
func (t *Table) collectOne() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.starts > 0 {
		return false
	}
	var info childInfo
	err := waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
	if err != nil || info.PID == 0 || t.owned[int(info.PID)] != nil {
		return false
	}
	return waitid(unix.P_PID, int(info.PID), &info, unix.WEXITED|unix.WNOHANG) == nil
}

// childInfo is siginfo_t as waitid fills it on 64-bit Linux.
type childInfo struct {
	Signo, Errno, Code int32
	_                  int32
	PID                int32
	UID                uint32
	Status             int32
	_                  [100]byte
}

const cldExited = 1 // si_code: ended by exit; all others: by a signal

func (i *childInfo) status() int {
	if i.Code == cldExited {
		return int(i.Status)
	}
	return 128 + int(i.Status)
}

func waitid(kind, id int, info *childInfo, options int) error {
	for {
		err := unix.Waitid(kind, id, (*unix.Siginfo)(unsafe.Pointer(info)), options, nil)
		if err != unix.EINTR {
			return err
		}
	}
}
