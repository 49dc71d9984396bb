package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// driverReady is how long a logging driver may take to say it is ready.
	driverReady = 10 * time.Second
	// driverDrain is how long it may take to end once its input has ended;
	// then it gets a SIGTERM, and after driverTerm a SIGKILL.
	driverDrain = 10 * time.Second
	driverTerm  = 2 * time.Second
)

// startDriver runs the logging driver that a binary URI names, with the
// process's output on its fds 3 and 4, and waits until it closes its fd 5 (for
// binary-v2: until it writes a byte to that). It ends when both outputs have
// been closed; its goroutine reaps it.
func startDriver(ctx context.Context, uri string, owner Owner, withStderr bool) (stdout, stderr io.WriteCloser, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	args, err := driverArgs(u.RawQuery)
	if err != nil {
		return nil, nil, err
	}
	var files [6]*os.File // reading and writing ends of stdout, stderr, ready
	defer func() {
		for i, f := range files {
			// The driver has its ends; the callers have theirs on success.
			if f != nil && (err != nil || i == 0 || i == 2 || i == 4 || i == 5) {
				f.Close() //nolint:errcheck // nothing was written
			}
		}
	}()
	for i := 0; i < len(files); i += 2 {
		if files[i], files[i+1], err = os.Pipe(); err != nil {
			return nil, nil, err
		}
	}
	driverCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	cmd := exec.CommandContext(driverCtx, u.Path, args...)
	cmd.Env = []string{"CONTAINER_ID=" + owner.ID, "CONTAINER_NAMESPACE=" + owner.Namespace}
	cmd.ExtraFiles = []*os.File{files[0], files[2], files[5]}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = driverTerm
	if err := cmd.Start(); err != nil {
		stop()
		return nil, nil, err
	}
	go func() {
		defer stop()
		if err := cmd.Wait(); err != nil {
			slog.Warn("logging driver failed", "driver", u.Path, "owner", owner.ID, "err", err)
		}
	}()
	files[5].Close() //nolint:errcheck // the driver has its own
	files[5] = nil
	if err := awaitDriver(ctx, files[4], u.Scheme == "binary-v2"); err != nil {
		stop()
		return nil, nil, err
	}
	var open atomic.Int32
	open.Store(2)
	ended := closerFunc(func() error {
		if open.Add(-1) == 0 {
			time.AfterFunc(driverDrain, stop) // does nothing to a driver that has ended
		}
		return nil
	})
	out, errOut := newOutput(files[1], files[1], ended), newOutput(files[3], files[3], ended)
	if !withStderr {
		return out, nil, errOut.Close()
	}
	return out, errOut, nil
}

// driverArgs turns a=b&c into the arguments a, b, c, "".
func driverArgs(query string) ([]string, error) {
	var args []string
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		key, value, _ := strings.Cut(pair, "=")
		for _, s := range []string{key, value} {
			arg, err := url.QueryUnescape(s)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			args = append(args, arg)
		}
	}
	return args, nil
}

// awaitDriver waits for the end of r, or with strict for a byte before that.
func awaitDriver(ctx context.Context, r *os.File, strict bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, driverReady, fmt.Errorf("it was not ready within %s", driverReady))
	defer cancel()
	defer context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })() //nolint:errcheck // pipes have deadlines
	n, err := r.Read(make([]byte, 1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case n == 0 && strict:
		return errors.New("it ended before it was ready")
	}
	return nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }
