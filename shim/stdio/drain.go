package stdio

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// drainPatience is how long a client that reads nothing is waited for.
const drainPatience = time.Second

// drainLimit bounds the wait for a FIFO that is read but written to all the same,
// by what the process left running.
const drainLimit = 30 * time.Second

// Drain waits until the clients have read what is in the output FIFOs, unless
// they are gone or stop reading. A client that is told of an exit before that
// may lose the end of the output: containerd's own closes its end first of all.
func (s *Streams) Drain() {
	for _, path := range s.fifos {
		drain(path, drainPatience)
	}
}

// drain waits for one FIFO to be empty. Any doubt about the FIFO ends the wait.
func drain(path string, patience time.Duration) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	reads := os.NewFile(uintptr(fd), "inotify")
	defer reads.Close() //nolint:errcheck // read only
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_ACCESS|unix.IN_CLOSE_NOWRITE); err != nil {
		return
	}
	// A writing end sees how much is in the FIFO, and fails where nobody reads.
	w, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(w) //nolint:errcheck // nothing was written
	before := -1
	for began := time.Now(); time.Since(began) < drainLimit; {
		left, err := unix.IoctlGetInt(w, unix.TIOCINQ)
		if err != nil || left == 0 || left == before || unread(w) {
			return
		}
		if err := reads.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return
		}
		before = -1
		switch _, err := reads.Read(make([]byte, 4096)); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			before = left // a read that inotify does not tell of, by splice, may have moved it
		case err != nil:
			return
		}
	}
}

// unread tells whether nobody reads a FIFO any more.
func unread(w int) bool {
	fds := []unix.PollFd{{Fd: int32(w)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0
}
