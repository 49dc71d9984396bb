package volume

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/virtcontainers/copies"
	"github.com/husk-containers/husk/virtcontainers/spec"
)

// maxLog is how much of a termination log reaches the host: the end of it, in bytes.
// The kubelet reads the last 4096 (MaxContainerTerminationMessageLength).
const maxLog = 64 << 10

// copy makes the guest's copy of the source, and has it follow.
func (v *volume) copy(ctx context.Context) error {
	// The copy takes its file over; Report needs the source still.
	src, err := duplicate(v.source.File)
	if err != nil {
		return err
	}
	v.following, err = copies.New(ctx, copies.Options{
		Source: src, Target: v.path, Inotify: v.table.inotify, Log: v.table.opts.Log,
		Dial: func(ctx context.Context) (net.Conn, error) { return v.table.opts.Guest.Dial(ctx, files.Port) },
	})
	return err
}

// duplicate returns another descriptor of an open file.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// dropCopy takes the guest's copy away.
func (v *volume) dropCopy(ctx context.Context) error {
	var errs []error
	if v.following != nil {
		errs = append(errs, v.following.Close())
	}
	err := v.onPort(ctx, func(conn net.Conn) error { return files.Drop(ctx, conn, v.path) })
	if !v.table.opts.Guest.Lost(err) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// onPort has f use a connection to the guest's port of files.
func (v *volume) onPort(ctx context.Context, f func(net.Conn) error) error {
	conn, err := v.table.opts.Guest.Dial(ctx, files.Port)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing more is said
	return f(conn)
}

// Report brings what the container has written to its termination log, at most the
// last 64 KiB, to the host. It does nothing where the mount is none.
func (m *Mount) Report(ctx context.Context) error {
	v := m.volume
	if m.bind.Role != spec.TerminationLog || v.key.kind != Copied || m.bind.ReadOnly {
		return nil
	}
	// It would take what is written here for news.
	if err := v.following.Close(); err != nil {
		return fmt.Errorf("%s: %w", m.bind.Field, err)
	}
	var log []byte
	err := v.onPort(ctx, func(conn net.Conn) (err error) {
		log, err = files.Read(ctx, conn, v.path, maxLog)
		return err
	})
	if err == nil {
		err = os.WriteFile(v.source.path(), log, 0)
	}
	if err != nil {
		return fmt.Errorf("%s: bring the termination log to the host: %w", m.bind.Field, err)
	}
	return nil
}

// Close gives back what the table itself holds, after the last Release. A nil table
// holds nothing.
func (t *Table) Close() error {
	if t == nil {
		return nil
	}
	return t.inotify.Close()
}
