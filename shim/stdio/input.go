package stdio

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/fifo"
	"golang.org/x/sys/unix"
)

// An input is the stdin FIFO. Once opened it holds a writing end too, so that a
// client that comes and goes is not the end of the input.
type input struct {
	path  string
	ready chan struct{} // closed when opened or closed

	mu     sync.Mutex
	r      *os.File // nil before open
	hold   *os.File // nil before open and after letGo
	gone   bool     // letGo was called
	closed bool
}

func newInput(uri string) (*input, error) {
	scheme, path, err := split(uri)
	if err != nil {
		return nil, err
	}
	if scheme != "fifo" {
		return nil, fmt.Errorf("%q is no FIFO: %w", uri, errdefs.ErrInvalidArgument)
	}
	if is, err := fifo.IsFifo(path); err != nil {
		return nil, err
	} else if !is {
		return nil, fmt.Errorf("%s is no FIFO: %w", path, errdefs.ErrInvalidArgument)
	}
	return &input{path: path, ready: make(chan struct{})}, nil
}

// open opens both ends. Neither waits: the second finds the first.
func (i *input) open() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.r != nil || i.closed {
		return nil
	}
	r, err := os.OpenFile(i.path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open stdin: %w", err)
	}
	enlarge(r)
	if !i.gone {
		if i.hold, err = os.OpenFile(i.path, unix.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
			return errors.Join(fmt.Errorf("open stdin: %w", err), r.Close())
		}
	}
	i.r = r
	close(i.ready)
	return nil
}

// letGo closes the held writing end, or sees to it that there will be none.
func (i *input) letGo() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.gone = true
	if i.hold != nil {
		i.hold.Close() //nolint:errcheck // nothing was written
		i.hold = nil
	}
}

// Read implements io.Reader.
func (i *input) Read(p []byte) (int, error) {
	<-i.ready
	i.mu.Lock()
	r := i.r
	i.mu.Unlock()
	if r == nil {
		return 0, os.ErrClosed
	}
	return r.Read(p)
}

// Close unblocks a Read.
func (i *input) Close() (err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	i.closed = true
	if i.r == nil {
		close(i.ready)
		return nil
	}
	err = i.r.Close() // before the writing end: no Read takes this for the end of the input
	if i.hold != nil {
		err = errors.Join(err, i.hold.Close())
	}
	i.hold = nil
	return err
}
