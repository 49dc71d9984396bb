// Package stdio opens the ends of a task's standard streams that containerd's
// clients name by URI.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/fifo"
	"golang.org/x/sys/unix"
)

// pipeSize is what a FIFO's buffer is enlarged to, in bytes: a client that is
// scheduled late then does not stop the flow.
const pipeSize = 1 << 20

// URIs name a process's streams, as containerd's task API does; an empty one is
// none.
//
//	/path, fifo:///path      a FIFO that the client made
//	file:///path             a file, appended to; made where it is missing
//	binary:///path?key=value a logging driver, started for the process
type URIs struct {
	Stdin, Stdout, Stderr string
	// Terminal has one output, Stdout.
	Terminal bool
}

// Owner is whose process it is; logging drivers are told.
type Owner struct {
	// ID of the container, or of the exec.
	ID        string
	Namespace string
}

// Streams are the shim's ends. A nil one is none. Each is closed by whom it was
// given to; closing twice does nothing. Reads of Stdin wait for OpenStdin.
type Streams struct {
	Stdin          io.ReadCloser
	Stdout, Stderr io.WriteCloser

	stdin *input
	fifos []string // the outputs' paths
}

// Open opens what the URIs name, all or nothing. An output FIFO is waited for
// until its reader is there or ctx ends: a process that writes and exits at once
// would be heard by nobody else.
func Open(ctx context.Context, u URIs, owner Owner) (_ *Streams, err error) {
	s := &Streams{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if u.Stdin != "" {
		if s.stdin, err = newInput(u.Stdin); err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
		s.Stdin = s.stdin
	}
	stderr := u.Stderr
	if u.Terminal {
		stderr = ""
	}
	stdout, scheme, err := u.Stdout, "", error(nil)
	if scheme, _, err = split(stdout); err != nil {
		return nil, fmt.Errorf("open stdout: %w", err)
	}
	if scheme == "binary" || scheme == "binary-v2" {
		// One driver takes both streams, whatever stderr names.
		s.Stdout, s.Stderr, err = startDriver(ctx, stdout, owner, stderr != "")
		if err != nil {
			return nil, fmt.Errorf("start logging driver %q: %w", stdout, err)
		}
		return s, nil
	}
	if s.Stdout, err = s.openOutput(ctx, stdout); err != nil {
		return nil, fmt.Errorf("open stdout: %w", err)
	}
	if s.Stderr, err = s.openOutput(ctx, stderr); err != nil {
		return nil, fmt.Errorf("open stderr: %w", err)
	}
	return s, nil
}

// OpenStdin begins to read the stdin FIFO, once the process is being started. A
// client's writes wait until then, and so a client that ends its input by a call
// to CloseIO knows the process by then: containerd's ctr forgets that call where
// it has read all of its own input before Create has returned.
func (s *Streams) OpenStdin() error {
	if s.stdin == nil {
		return nil
	}
	return s.stdin.open()
}

// CloseStdin lets go of the shim's writing end of the stdin FIFO: the process
// reads EOF once it has read what is there and the clients have closed theirs.
func (s *Streams) CloseStdin() {
	if s.stdin != nil {
		s.stdin.letGo()
	}
}

// Close closes every stream.
func (s *Streams) Close() {
	if s.Stdin != nil {
		s.Stdin.Close() //nolint:errcheck // nothing is lost
	}
	for _, w := range []io.Closer{s.Stdout, s.Stderr} {
		if w != nil {
			w.Close() //nolint:errcheck // nothing is lost
		}
	}
}

// split takes a URI apart; a plain path is a FIFO's.
func split(uri string) (scheme, path string, err error) {
	if uri == "" {
		return "", "", nil
	}
	scheme, path, ok := strings.Cut(uri, "://")
	if !ok {
		scheme, path = "fifo", uri
	}
	switch scheme {
	case "fifo", "file", "binary", "binary-v2":
	default:
		return "", "", fmt.Errorf("scheme %q of %q is none of fifo, file, binary: %w", scheme, uri, errdefs.ErrNotImplemented)
	}
	if !strings.HasPrefix(path, "/") {
		return "", "", fmt.Errorf("%q is no absolute path: %w", uri, errdefs.ErrInvalidArgument)
	}
	return scheme, path, nil
}

// An output is closed once.
type output struct {
	io.Writer
	close func() error
}

func newOutput(w io.Writer, closers ...io.Closer) *output {
	return &output{Writer: w, close: sync.OnceValue(func() error {
		var errs []error
		for _, c := range closers {
			errs = append(errs, c.Close())
		}
		return errors.Join(errs...)
	})}
}

// Close unblocks a Write.
func (o *output) Close() error { return o.close() }

// openOutput opens a FIFO or a file.
func (s *Streams) openOutput(ctx context.Context, uri string) (io.WriteCloser, error) {
	if uri == "" {
		return nil, nil
	}
	scheme, path, err := split(uri)
	if err != nil {
		return nil, err
	}
	if scheme == "binary" || scheme == "binary-v2" {
		return nil, fmt.Errorf("%q: a logging driver is named by stdout: %w", uri, errdefs.ErrInvalidArgument)
	}
	if scheme == "fifo" {
		is, err := fifo.IsFifo(path)
		if err != nil {
			return nil, err
		}
		if is {
			s.fifos = append(s.fifos, path)
			return openFIFO(ctx, path)
		}
	}
	return openFile(path, scheme == "file")
}

// openFIFO waits for a reader and then holds a reading end too: a client that
// detaches neither ends the process by a broken pipe nor, coming back, finds
// less than the buffer holds.
func openFIFO(ctx context.Context, path string) (io.WriteCloser, error) {
	w, err := fifo.OpenFifo(ctx, path, syscall.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("wait for a reader of %s: %w", path, err)
	}
	r, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	enlarge(r)
	return newOutput(w, w, r), nil
}

// enlarge gives a FIFO a bigger buffer. Where the kernel refuses it works as
// well, only slower.
func enlarge(f *os.File) {
	conn, err := f.SyscallConn()
	if err != nil {
		return
	}
	conn.Control(func(fd uintptr) { //nolint:errcheck // the file is open
		unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) //nolint:errcheck // see above
	})
}
