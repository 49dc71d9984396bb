package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

// copyBuffer is large enough that a chunk's cost is the copy, not the call.
const copyBuffer = 128 << 10

// A Stdio is the host's end of a process's standard streams; a nil end is
// /dev/null. The process owns them and closes them at its end. With Terminal,
// Stdout carries both output streams and Stderr is nil.
type Stdio struct {
	Terminal bool
	Stdin    io.ReadCloser
	Stdout   io.WriteCloser
	Stderr   io.WriteCloser
}

func (s Stdio) close() {
	if s.Stdin != nil {
		s.Stdin.Close() //nolint:errcheck // nothing is lost
	}
	for _, w := range []io.WriteCloser{s.Stdout, s.Stderr} {
		if w != nil {
			w.Close() //nolint:errcheck // what was written was counted
		}
	}
}

// streams are the connections of one process and their copiers. A nil *streams
// has none.
type streams struct {
	stdio          Stdio
	in             net.Conn
	stdout, stderr *outflow
	copiers        sync.WaitGroup
}

// connect opens a connection to the guest for every stream in stdio, offers each
// under a fresh token, and starts to copy.
func connect(ctx context.Context, dial func(context.Context, uint32) (net.Conn, error), stdio Stdio) (*streams, *agentv1.Streams, error) {
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
	s := &streams{stdio: stdio, in: in, stdout: newOutflow(out, stdio.Stdout), stderr: newOutflow(err, stdio.Stderr)}
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

func (s *streams) copyStdin() {
	// The wrapper hides ReadFrom and WriteTo: a plain loop over one buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{s.in}, struct{ io.Reader }{s.stdio.Stdin}, make([]byte, copyBuffer))
	if err == nil || errors.Is(err, io.EOF) {
		if cw, ok := s.in.(interface{ CloseWrite() error }); ok {
			cw.CloseWrite() //nolint:errcheck // the guest has gone: its process too
		}
	}
}

// stopStdin ends the copying of standard input; nobody reads it any more.
func (s *streams) stopStdin() {
	if s == nil || s.stdio.Stdin == nil {
		return
	}
	s.stdio.Stdin.Close() //nolint:errcheck // nothing is lost
	s.in.Close()          //nolint:errcheck // likewise
}

// delivered waits until as many bytes as the guest says it sent have been
// written out, or the stream has ended, or nothing has moved for the time of
// patience: a client that does not read must not hold back an exit for ever.
func (s *streams) delivered(stdout, stderr uint64, patience time.Duration) {
	if s == nil {
		return
	}
	s.stdout.await(stdout, patience)
	s.stderr.await(stderr, patience)
}

// close ends every stream and waits for the copiers.
func (s *streams) close() {
	if s == nil {
		return
	}
	s.stopStdin()
	for _, o := range []*outflow{s.stdout, s.stderr} {
		if o != nil {
			o.conn.Close() //nolint:errcheck // nothing more is wanted from it
		}
	}
	s.stdio.close()
	s.copiers.Wait()
}

// outflow copies one output stream from the guest and counts what it delivered.
type outflow struct {
	conn  net.Conn
	w     io.WriteCloser
	n     atomic.Uint64
	moved chan struct{} // a token after each write
	ended chan struct{}
}

func newOutflow(conn net.Conn, w io.WriteCloser) *outflow {
	if conn == nil {
		return nil
	}
	return &outflow{conn: conn, w: w, moved: make(chan struct{}, 1), ended: make(chan struct{})}
}

// copy runs until the guest's end of the stream. A writer that fails is written
// to no more, but the guest's process is not blocked for it.
func (o *outflow) copy() {
	defer close(o.ended)
	defer o.w.Close()    //nolint:errcheck // every write was checked
	defer o.conn.Close() //nolint:errcheck // read to its end
	buf := make([]byte, copyBuffer)
	broken := false
	for {
		n, err := o.conn.Read(buf)
		if n > 0 && !broken {
			_, werr := o.w.Write(buf[:n])
			broken = werr != nil
		}
		o.n.Add(uint64(n))
		select {
		case o.moved <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (o *outflow) await(n uint64, patience time.Duration) {
	if o == nil {
		return
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for o.n.Load() < n {
		select {
		case <-o.moved:
			timer.Reset(patience)
		case <-o.ended:
			return
		case <-timer.C:
			return
		}
	}
}
