// Package streams is the host's end of a process's standard streams: one
// connection to the guest for each, and a copier for each connection.
package streams

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

// copyBuffer is large enough that a chunk's cost is the copy, not the call.
const copyBuffer = 128 << 10

// A Stdio is the host's end of a process's standard streams; a nil end is
// /dev/null. The process owns them and closes them at its end; closing one twice
// does nothing. With Terminal, Stdout carries both output streams and Stderr is
// nil.
type Stdio struct {
	Terminal bool
	Stdin    io.ReadCloser
	Stdout   io.WriteCloser
	Stderr   io.WriteCloser
}

// Close closes every end.
func (s Stdio) Close() {
	if s.Stdin != nil {
		s.Stdin.Close() //nolint:errcheck // nothing is lost
	}
	for _, w := range []io.WriteCloser{s.Stdout, s.Stderr} {
		if w != nil {
			w.Close() //nolint:errcheck // what was written was counted
		}
	}
}

// A Set is the connections of one process and their copiers. A nil *Set has
// none. Its methods are safe for concurrent use.
type Set struct {
	stdio          Stdio
	in             net.Conn
	stdout, stderr *outflow
	copiers        sync.WaitGroup
}

// Connect opens a connection to the guest for every stream in stdio, offers each
// under a fresh token, and starts to copy. On error stdio is untouched.
func Connect(ctx context.Context, dial func(context.Context, uint32) (net.Conn, error), stdio Stdio) (*Set, *agentv1.Streams, error) {
	names := &agentv1.Streams{Terminal: stdio.Terminal}
	var in, out, err net.Conn
	g, gctx := errgroup.WithContext(ctx)
	open := func(conn *net.Conn, token *[]byte) {
		g.Go(func() error {
			c, err := dial(gctx, stream.Port)
			if err != nil {
				return fmt.Errorf("connect a stream to the guest: %w", err)
			}
			*conn = c
			t := stream.NewToken()
			*token = t[:]
			return stream.Offer(gctx, c, t)
		})
	}
	if stdio.Stdin != nil {
		open(&in, &names.Stdin)
	}
	if stdio.Stdout != nil {
		open(&out, &names.Stdout)
	}
	if stdio.Stderr != nil && !stdio.Terminal {
		open(&err, &names.Stderr)
	}
	if e := g.Wait(); e != nil {
		for _, c := range []net.Conn{in, out, err} {
			if c != nil {
				c.Close() //nolint:errcheck // the offer's error says more
			}
		}
		return nil, nil, e
	}
	s := &Set{stdio: stdio, in: in, stdout: newOutflow(out, stdio.Stdout), stderr: newOutflow(err, stdio.Stderr)}
	if in != nil {
		s.copiers.Go(s.copyStdin)
	}
	for _, o := range []*outflow{s.stdout, s.stderr} {
		if o != nil {
			s.copiers.Go(o.copy)
		}
	}
	return s, names, nil
}

func (s *Set) copyStdin() {
	// The wrapper hides ReadFrom and WriteTo: a plain loop over one buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{s.in}, struct{ io.Reader }{s.stdio.Stdin}, make([]byte, copyBuffer))
	if err == nil || errors.Is(err, io.EOF) {
		if cw, ok := s.in.(interface{ CloseWrite() error }); ok {
			cw.CloseWrite() //nolint:errcheck // the guest has gone: its process too
		}
	}
}

// StopStdin ends the copying of standard input; nobody reads it any more.
func (s *Set) StopStdin() {
	if s == nil || s.in == nil {
		return
	}
	s.stdio.Stdin.Close() //nolint:errcheck // nothing is lost
	s.in.Close()          //nolint:errcheck // likewise
}

// Deliver waits until as many bytes as the guest says it has sent have been
// written out, or the stream has ended. It gives up where nothing has moved for
// the time of patience, for a client that does not read must not hold back an
// exit for ever; and where the guest was waited for that long in all, for what it
// says it has sent is there already.
func (s *Set) Deliver(stdout, stderr uint64, patience time.Duration) {
	if s == nil {
		return
	}
	promised := time.Now()
	s.stdout.promise(promised)
	s.stderr.promise(promised)
	s.stdout.await(stdout, patience)
	s.stderr.await(stderr, patience)
}

// Close ends every stream and waits for the copiers.
func (s *Set) Close() {
	if s == nil {
		return
	}
	s.StopStdin()
	for _, o := range []*outflow{s.stdout, s.stderr} {
		if o != nil {
			o.conn.Close() //nolint:errcheck // nothing more is wanted from it
		}
	}
	s.stdio.Close()
	s.copiers.Wait()
}
