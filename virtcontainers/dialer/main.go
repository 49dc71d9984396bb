package dialer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// name is what ps shows.
	name = "husk-dialer"
	// fdPair is the dialer's end of the pair.
	fdPair = 3
	// connectTimeout bounds the wait for room in a server's queue.
	connectTimeout = 10 * time.Second
	// memory that the process should get by with, in bytes: it is the container's.
	memory = 16 << 20
)

// Main is the process. It returns when the shim has closed its end.
func Main() error {
	unix.CloseOnExec(fdPair)
	os.WriteFile("/proc/self/comm", []byte(name), 0) //nolint:errcheck // for who lists processes
	debug.SetMemoryLimit(memory)
	if err := unix.SetNonblock(fdPair, true); err != nil {
		return err
	}
	conn, err := fileConn(fdPair)
	if err != nil {
		return err
	}
	var dials sync.WaitGroup
	defer dials.Wait()
	for {
		request, fd, err := receive(conn, requestSize)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		dials.Go(func() { serve(conn, request, fd) })
	}
}

// serve answers one request.
func serve(conn *net.UnixConn, request []byte, socket int) {
	fd, err := connect(socket)
	message := binary.LittleEndian.AppendUint32(request, uint32(errno(err)))
	var oob []byte
	if err == nil {
		oob = unix.UnixRights(fd)
		defer unix.Close(fd) //nolint:errcheck // the shim has its own
	}
	conn.WriteMsgUnix(message, oob, nil) //nolint:errcheck // the shim is gone, and so is this process
}

// connect connects to the socket that an O_PATH file is of, and closes the file. The
// kernel checks by this process's ids whether it may.
func connect(socket int) (int, error) {
	if socket < 0 {
		return -1, unix.EBADF
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was written
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// A connect blocks while the server's queue is full; one that is not to block
	// fails, and nothing tells when there is room.
	timeout := unix.NsecToTimeval(connectTimeout.Nanoseconds())
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err == nil {
		err = connectTo(fd, fmt.Sprintf("/proc/self/fd/%d", socket))
	}
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{})
	}
	if err != nil {
		unix.Close(fd) //nolint:errcheck // unused
		return -1, err
	}
	return fd, nil
}

// connectTo connects through the interruptions by which Go has its goroutines share
// threads.
func connectTo(fd int, path string) error {
	for {
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if e := syscall.Errno(0); errors.As(err, &e) {
		return e
	}
	return syscall.EIO
}
