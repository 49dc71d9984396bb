// Package dialer is a process that connects to unix sockets in the name of a
// container: as its user, in its cgroup.
//
// The shim starts one for each container and passes it sockets, as O_PATH files; it
// connects to each and passes the connection back.
//
//	shim                                             dialer
//	 | number[4]                    + O_PATH file      |
//	 |------------------------------------------------>| connect
//	 |             number[4] errno[4] [+ connection]   |
//	 |<------------------------------------------------|
//
// Messages are those of a SOCK_SEQPACKET pair; answers come in any order; numbers are
// little-endian. The dialer knows no path, and hears nothing of the guest.
package dialer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/child"
)

// Arg, alone, makes of the shim's program a dialer.
const Arg = "socket-dialer"

// Is tells whether a program is to be a dialer, by its arguments: then it calls Main.
func Is(args []string) bool { return len(args) == 2 && args[1] == Arg }

// ErrGone is the error of a dial where the process has ended.
var ErrGone = errors.New("the process that connects to sockets has ended")

const (
	requestSize = 4
	answerSize  = 8
)

// Options say in whose name a dialer connects.
type Options struct {
	UID, GID uint32
	Groups   []uint32
	// Enter puts the process where it belongs, before it can connect anywhere.
	Enter func(pid int) error
}

// A Dialer is the shim's end of a process. Its methods are safe for concurrent use.
type Dialer struct {
	child *child.Child
	conn  *net.UnixConn
	work  sync.WaitGroup // the reader

	mu      sync.Mutex
	last    uint32
	waiting map[uint32]chan<- answer // nil once the process has ended
}

type answer struct {
	conn net.Conn
	err  error
}

// Start starts a process of this program that has the user's ids and nothing else:
// no capability, no descriptor but its end of the pair.
func Start(o Options) (*Dialer, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "dialer")
	conn, err := fileConn(fds[0])
	if err != nil {
		return nil, errors.Join(err, theirs.Close())
	}
	spec := child.Spec{
		// Not by its path, on which that user may be kept out.
		Path: "/proc/self/exe", Args: []string{Arg}, Dir: "/", ExtraFiles: []*os.File{theirs},
		UID: int(o.UID), GID: int(o.GID), NoCapabilities: true, NoNewPrivs: true,
	}
	for _, g := range o.Groups {
		spec.Groups = append(spec.Groups, int(g))
	}
	process, err := child.Start(spec)
	theirs.Close() //nolint:errcheck // the process has its own; held here, its end would not be seen
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the process that connects to sockets: %w", err), conn.Close())
	}
	d := &Dialer{child: process, conn: conn, waiting: map[uint32]chan<- answer{}}
	if o.Enter != nil {
		err = o.Enter(process.PID())
	}
	d.work.Go(d.read)
	if err != nil {
		return nil, errors.Join(err, d.Stop(context.Background()))
	}
	return d, nil
}

// fileConn takes over a descriptor.
func fileConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() //nolint:errcheck // conn has a duplicate
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("a %T is no unix socket", conn), conn.Close())
	}
	return c, nil
}

// PID is the process's.
func (d *Dialer) PID() int { return d.child.PID() }

// Done is closed when the process has ended.
func (d *Dialer) Done() <-chan struct{} { return d.child.Done() }

// Dial connects to a socket, an O_PATH file that the caller keeps. The error wraps
// the syscall.Errno of the connect, or ErrGone.
func (d *Dialer) Dial(ctx context.Context, socket *os.File) (net.Conn, error) {
	result := make(chan answer, 1)
	d.mu.Lock()
	if d.waiting == nil {
		d.mu.Unlock()
		return nil, d.gone()
	}
	d.last++
	number := d.last
	d.waiting[number] = result
	d.mu.Unlock()
	_, _, err := d.conn.WriteMsgUnix(binary.LittleEndian.AppendUint32(nil, number), unix.UnixRights(int(socket.Fd())), nil)
	if err != nil {
		d.mu.Lock()
		delete(d.waiting, number)
		d.mu.Unlock()
		return nil, fmt.Errorf("%w: %w", d.gone(), err)
	}
	select {
	case a := <-result:
		return a.conn, a.err
	case <-ctx.Done():
	}
	d.mu.Lock()
	_, waits := d.waiting[number]
	delete(d.waiting, number)
	d.mu.Unlock()
	if !waits { // the answer was faster
		if a := <-result; a.conn != nil {
			a.conn.Close()
		}
	}
	return nil, fmt.Errorf("connect: %w", context.Cause(ctx))
}

func (d *Dialer) gone() error { return fmt.Errorf("%w: %s", ErrGone, d.child.Cause()) }

// read hands out the answers, until the process ends.
func (d *Dialer) read() {
	for {
		number, a, err := d.readAnswer()
		if err != nil {
			break
		}
		d.mu.Lock()
		result := d.waiting[number]
		delete(d.waiting, number)
		d.mu.Unlock()
		switch {
		case result != nil:
			result <- a
		case a.conn != nil:
			a.conn.Close()
		}
	}
	d.child.Kill() // where it has only closed its end
	<-d.child.Done()
	d.mu.Lock()
	waiting := d.waiting
	d.waiting = nil
	d.mu.Unlock()
	for _, result := range waiting {
		result <- answer{err: d.gone()}
	}
}

func (d *Dialer) readAnswer() (number uint32, a answer, err error) {
	b, fd, err := receive(d.conn, answerSize)
	if err != nil {
		return 0, answer{}, err
	}
	if errno := syscall.Errno(binary.LittleEndian.Uint32(b[4:])); errno != 0 || fd < 0 {
		if fd >= 0 {
			unix.Close(fd) //nolint:errcheck // never asked for
		}
		if errno == 0 {
			errno = unix.EPROTO
		}
		a.err = os.NewSyscallError("connect", errno)
	} else if a.conn, a.err = fileConn(fd); a.err != nil {
		a.conn = nil // not a typed one
	}
	return binary.LittleEndian.Uint32(b), a, nil
}

// receive reads one message of that size, and the descriptor that came with it; -1
// if none did.
func receive(conn *net.UnixConn, size int) (b []byte, fd int, err error) {
	b = make([]byte, size+1)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, -1, err
	}
	fds, err := rights(oob[:oobn])
	switch {
	case err == nil && n == 0 && len(fds) == 0:
		err = io.EOF
	case err == nil && (n != size || len(fds) > 1):
		err = fmt.Errorf("a message of %d bytes with %d descriptors", n, len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd) //nolint:errcheck // nobody has it
		}
		return nil, -1, err
	}
	if len(fds) == 0 {
		return b[:n], -1, nil
	}
	return b[:n], fds[0], nil
}

func rights(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		more, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return fds, err
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

// stopTimeout bounds the end of a process that has nothing to clean up.
const stopTimeout = 5 * time.Second

// Stop ends the process, and returns when it has ended and no dial waits for it. It
// is idempotent.
func (d *Dialer) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	err := d.child.Stop(ctx, unix.SIGKILL)
	if err == nil {
		d.work.Wait() // the process's end of the pair is closed
	}
	if cerr := d.conn.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	return err
}
