package files

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// answerTimeout bounds the wait for why the guest has read no further.
const answerTimeout = 5 * time.Second

var (
	past = time.Unix(1, 0)

	errEarly = fmt.Errorf("the guest was done before the end: %w", ErrHandshake)
)

// Sync is the host's end: it asks on conn, a fresh connection to Port, that the
// copy at target become what the tar archive that write writes says, and returns
// when it is. The archive's first entry is named "." and is the target itself: a
// directory, or a regular file, which then is the only one. The others are named by
// their clean paths below it, directories before what they hold, each once;
// directories, regular files and symlinks. An error of write, which may be one of
// its Writer's, has nothing changed. Errors of the guest have their errdefs class:
// ResourceExhausted where its memory does not suffice. The operation ends when ctx
// does. After it conn is of no further use and the caller closes it.
func Sync(ctx context.Context, conn net.Conn, target string, write func(io.Writer) error) error {
	return send(ctx, conn, Request{Op: OpSync, Path: target}, write)
}

// Read returns the last bytes, most at most, of the copied file at target. Of conn
// the same holds as of Sync's.
func Read(ctx context.Context, conn net.Conn, target string, most int) ([]byte, error) {
	buf := &capped{most: most}
	if err := receive(ctx, conn, Request{Op: OpRead, Path: target, Max: most}, buf); err != nil {
		return nil, err
	}
	return buf.b, nil
}

// Drop removes the copy at target. Where there is none that is no error. Of conn
// the same holds as of Sync's.
func Drop(ctx context.Context, conn net.Conn, target string) error {
	return send(ctx, conn, Request{Op: OpDrop, Path: target}, nil)
}

// Put extracts archive, a tar archive, into the directory at path in a running
// container, which stays half done where it fails. FailedPrecondition where the
// container does not run or the file system is read-only, NotFound where there is
// no such container or directory. Of conn the same holds as of Sync's.
func Put(ctx context.Context, conn net.Conn, container, path string, archive io.Reader) error {
	return send(ctx, conn, Request{Op: OpPut, Container: container, Path: path}, func(w io.Writer) error {
		_, err := io.Copy(w, archive)
		return err
	})
}

// Get writes to w a tar archive of what is at path in a running container, the
// names in it beginning with the last element of path. A symlink there is not
// followed, unless path ends with a slash. After an error part of the archive is
// written. Errors are as Put's; what the archive holds is the guest's word. Of conn
// the same holds as of Sync's.
func Get(ctx context.Context, conn net.Conn, container, path string, w io.Writer) error {
	return receive(ctx, conn, Request{Op: OpGet, Container: container, Path: path}, w)
}

// bound ends what waits on conn when ctx ends; the function that it returns, to be
// called once with the result, makes the result of that ctx's cause.
func bound(ctx context.Context, conn net.Conn) func(Request, error) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(past) }) //nolint:errcheck // closed or done
	return func(r Request, err error) error {
		var said *guestError
		switch stopped := stop(); {
		case err == nil, errors.As(err, &said):
			return err
		case !stopped && ctx.Err() != nil:
			return fmt.Errorf("%s: %w", r, context.Cause(ctx))
		}
		return fmt.Errorf("%s: %w", r, err)
	}
}

// send makes an operation with a body of the host's; write is nil where it has
// none.
func send(ctx context.Context, conn net.Conn, r Request, write func(io.Writer) error) error {
	if err := r.Validate(); err != nil {
		return err
	}
	end := bound(ctx, conn)
	if _, err := conn.Write(appendRequest(nil, r)); err != nil {
		return end(r, err)
	}
	if write == nil {
		return end(r, readAnswer(conn))
	}
	answered := make(chan error, 1)
	heard := make(chan struct{})
	go func() { // ends with conn's read deadline, at the latest
		err := readAnswer(conn)
		close(heard)
		conn.SetWriteDeadline(past) //nolint:errcheck // closed or done
		answered <- err
	}()
	body := NewBodyWriter(ending{conn, heard})
	werr := write(body)
	switch {
	case werr == nil && body.Close() == nil: // the guest takes the time it takes
	case body.err != nil:
		conn.SetReadDeadline(time.Now().Add(answerTimeout)) //nolint:errcheck // closed or done
		if ctx.Err() != nil {                               // which may have set an earlier one
			conn.SetReadDeadline(past) //nolint:errcheck // likewise
		}
	default:
		conn.SetReadDeadline(past) //nolint:errcheck // likewise
	}
	err := <-answered
	var said *guestError
	switch {
	case werr == nil, errors.As(err, &said):
	case err == nil:
		err = errEarly
	case !errors.Is(werr, os.ErrDeadlineExceeded): // else err says why there was one
		err = werr
	}
	return end(r, err)
}

// receive makes an operation with a body of the guest's.
func receive(ctx context.Context, conn net.Conn, r Request, w io.Writer) error {
	if err := r.Validate(); err != nil {
		return err
	}
	end := bound(ctx, conn)
	if _, err := conn.Write(appendRequest(nil, r)); err != nil {
		return end(r, err)
	}
	rd := bufio.NewReader(ending{conn, ctx.Done()})
	if _, err := io.Copy(w, newBodyReader(rd)); err != nil {
		return end(r, err)
	}
	return end(r, readAnswer(rd))
}

// An ending connection is one until ended is closed. A deadline alone ends only what
// waits, and a peer that is quick enough has nothing wait.
type ending struct {
	net.Conn
	ended <-chan struct{}
}

func (e ending) Read(p []byte) (int, error) {
	select {
	case <-e.ended:
		return 0, os.ErrDeadlineExceeded
	default:
		return e.Conn.Read(p)
	}
}

func (e ending) Write(p []byte) (int, error) {
	select {
	case <-e.ended:
		return 0, os.ErrDeadlineExceeded
	default:
		return e.Conn.Write(p)
	}
}

// A capped writer takes so many bytes and refuses more.
type capped struct {
	b    []byte
	most int
}

func (c *capped) Write(p []byte) (int, error) {
	if len(p) > c.most-len(c.b) {
		return 0, fmt.Errorf("the guest sends more than the %d bytes asked for: %w", c.most, ErrHandshake)
	}
	c.b = append(c.b, p...)
	return len(p), nil
}
