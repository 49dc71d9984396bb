package bootstrap

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A logPipe writes log lines to the FIFO that containerd copies from. It never
// blocks and never fails: it holds both ends, so that the FIFO outlives
// containerd's restart with the lines that fit in it, and what does not fit is
// counted and dropped.
type logPipe struct {
	fd      int
	dropped atomic.Int64
}

// openLog opens the FIFO, or nothing where there is none.
func openLog(path string) (*logPipe, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		fd, err = unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open the shim's log: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	return &logPipe{fd: fd}, nil
}

// takeStderr makes the log what a panic is written to.
func (l *logPipe) takeStderr() error { return unix.Dup3(l.fd, unix.Stderr, 0) }

// Write writes one line, at most PIPE_BUF bytes of it in one piece.
func (l *logPipe) Write(line []byte) (int, error) {
	if n := l.dropped.Swap(0); n > 0 {
		note := fmt.Appendf(nil, "level=warning msg=\"log lines dropped: containerd did not read them\" lines=%d\n", n)
		if _, err := unix.Write(l.fd, note); err != nil {
			l.dropped.Add(n)
		}
	}
	if _, err := unix.Write(l.fd, line); err != nil {
		l.dropped.Add(1)
	}
	return len(line), nil
}

var _ io.Writer = (*logPipe)(nil)

// handler formats like the rest of containerd's log.
func (l *logPipe) handler(level slog.Leveler) slog.Handler {
	return slog.NewTextHandler(l, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.LevelKey {
			return slog.String(a.Key, strings.ToLower(a.Value.String()))
		}
		return a
	}})
}
