package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	mediaType = "application/x-tar"
	// maxStreams bounds the streams that are open at a time, and with the window
	// what they keep in memory.
	maxStreams = 64
	// maxID bounds the id of a stream, in bytes.
	maxID = 256
	// claimTimeout: containerd's clients call Transfer right after they have opened
	// their streams.
	claimTimeout = 30 * time.Second
	// window is how much a client may send before it is read, in bytes: four of its
	// messages.
	window = 4 * maxData
	// maxData is what containerd's own streams send in a message at most, in bytes.
	maxData = 32 << 10
)

// errFinished is the cause of a stream's end in order.
var errFinished = errors.New("finished")

// A stream is one that a client has opened. Once claimed, by a Transfer, it is read or
// written by one goroutine.
type stream struct {
	wire streaming.TTRPCStreaming_StreamServer
	// ctx ends with the stream; its cause says why.
	ctx context.Context //nolint:containedctx // the stream's lifetime
	end context.CancelCauseFunc
	// id is sent once the client has told it; claimed is closed, under the service's
	// lock, when a Transfer has taken the stream.
	id      chan string
	claimed chan struct{}
	// changed wakes the one who reads or writes.
	changed chan struct{}

	mu     sync.Mutex
	taken  bool         // claimed
	writes bool         // claimed, by one who writes to the client
	eof    bool         // the client sends no more
	buffer bytes.Buffer // received, and not yet read; at most window
	credit int64        // what the client may still send
	read   int64        // since the last credit was given
	window int64        // what the client still takes
	total  int64        // of what has come or gone
}

// Stream serves a stream until its Transfer has ended, the client is gone, or nobody
// claims it in time.
func (s *Service) Stream(ctx context.Context, wire streaming.TTRPCStreaming_StreamServer) (err error) {
	defer func() { err = status(err) }()
	if err := s.begin(); err != nil {
		return err
	}
	defer s.work.Done()
	if n := s.open.Add(1); n > maxStreams {
		s.open.Add(-1)
		return fmt.Errorf("stream: %d are open, which is the most at a time: %w", n-1, errdefs.ErrResourceExhausted)
	}
	defer s.open.Add(-1)
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(s.life, func() { end(context.Cause(s.life)) })()
	st := &stream{wire: wire, ctx: ctx, end: end, id: make(chan string, 1), claimed: make(chan struct{}), changed: make(chan struct{}, 1)}
	s.work.Go(st.receive) // ends when ttrpc ends the call, of which it hears when this returns
	timer := time.NewTimer(s.claimTimeout)
	defer timer.Stop()

	select {
	case id := <-st.id:
		if err := s.add(id, st); err != nil {
			return err
		}
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.streams, id)
		}()
		if err := st.send(&emptypb.Empty{}); err != nil {
			return err
		}
	case <-timer.C:
		return fmt.Errorf("stream: its first message did not come within %v: %w", s.claimTimeout, context.DeadlineExceeded)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-st.claimed:
	case <-timer.C:
		st.end(fmt.Errorf("stream: no transfer has used it within %v: %w", s.claimTimeout, context.DeadlineExceeded))
	case <-ctx.Done():
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); cause != errFinished { //nolint:errorlint // it is never wrapped
		return cause
	}
	return nil
}

func (s *Service) add(id string, st *stream) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("stream: its id has %d bytes, want 1 to %d: %w", len(id), maxID, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams[id] != nil {
		return fmt.Errorf("stream %q: %w", id, errdefs.ErrAlreadyExists)
	}
	s.streams[id] = st
	return nil
}

// claim takes a stream for a transfer, which must finish it, and may write to the client
// or read.
func (s *Service) claim(id string, writes bool) (*stream, error) {
	s.mu.Lock()
	st := s.streams[id]
	s.mu.Unlock()
	if st == nil {
		return nil, fmt.Errorf("stream %q was not opened, or has ended: %w", id, errdefs.ErrNotFound)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.taken {
		return nil, fmt.Errorf("stream %q is used by another transfer: %w", id, errdefs.ErrFailedPrecondition)
	}
	st.taken, st.writes = true, writes
	close(st.claimed)
	return st, nil
}

// finish ends the stream, by err or in order.
func (st *stream) finish(err error) {
	if err == nil {
		err = errFinished
	}
	st.end(err)
}

// receive takes what the client sends, all at once: nothing piles up before it. It
// returns when the client sends no more.
func (st *stream) receive() {
	a, err := st.wire.Recv()
	var first streaming.StreamInit
	if err == nil {
		err = decode(a, &first)
	}
	if err == nil {
		st.id <- first.ID
	}
	for err == nil {
		if a, err = st.wire.Recv(); err == nil {
			err = st.take(a)
		}
	}
	if errors.Is(err, io.EOF) {
		st.hangUp()
		return
	}
	st.end(err)
}

// take takes one message. What the client may not send ends the stream.
func (st *stream) take(a *anypb.Any) error {
	var data types.Data
	var update types.WindowUpdate
	switch {
	case a.MessageIs(&data):
		if err := decode(a, &data); err != nil {
			return err
		}
		n := int64(len(data.Data))
		st.mu.Lock()
		defer st.mu.Unlock()
		if n > st.credit {
			return fmt.Errorf("stream: %d bytes were sent where the window has %d: %w", n, st.credit, errdefs.ErrInvalidArgument)
		}
		st.credit -= n
		st.total += n
		st.buffer.Write(data.Data)
	case a.MessageIs(&update):
		if err := decode(a, &update); err != nil {
			return err
		}
		if update.Update < 0 {
			return fmt.Errorf("stream: a window that shrinks by %d: %w", update.Update, errdefs.ErrInvalidArgument)
		}
		st.mu.Lock()
		defer st.mu.Unlock()
		st.window = min(st.window+int64(update.Update), math.MaxInt32)
	default:
		return fmt.Errorf("stream: a message of type %.100q: %w", a.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
	st.wake()
	return nil
}

// hangUp notes that the client sends no more. That ends what goes to the client: it
// has no other way to say that it does not want it.
func (st *stream) hangUp() {
	st.mu.Lock()
	st.eof = true
	over := !st.taken || st.writes
	st.mu.Unlock()
	if over {
		st.end(fmt.Errorf("stream: the client has closed it: %w", errdefs.ErrAborted))
	}
	st.wake()
}

// wake wakes the one who waits, if somebody else has not done so.
func (st *stream) wake() {
	select {
	case st.changed <- struct{}{}:
	default:
	}
}

// wait returns when something has changed, or with why the stream has ended.
func (st *stream) wait() error {
	select {
	case <-st.changed:
		return nil
	case <-st.ctx.Done():
		return context.Cause(st.ctx)
	}
}

// grant lets the client send n bytes more.
func (st *stream) grant(n int64) error {
	st.mu.Lock()
	st.credit += n
	st.mu.Unlock()
	return st.send(&types.WindowUpdate{Update: int32(n)})
}

// Read implements io.Reader with what the client sends.
func (st *stream) Read(p []byte) (int, error) {
	for {
		if st.ctx.Err() != nil {
			return 0, context.Cause(st.ctx)
		}
		st.mu.Lock()
		n, _ := st.buffer.Read(p) // its only error is that it is empty
		st.read += int64(n)
		owed := st.read
		// Half a window spares messages, and does not make the client wait.
		if owed < window/2 || st.eof {
			owed = 0
		}
		st.read -= owed
		eof := st.eof
		st.mu.Unlock()
		switch {
		case owed > 0:
			return n, st.grant(owed)
		case n > 0 || len(p) == 0:
			return n, nil
		case eof:
			return 0, io.EOF
		}
		if err := st.wait(); err != nil {
			return 0, err
		}
	}
}

// Write implements io.Writer: what is written goes to the client, as far as it takes it.
func (st *stream) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		if st.ctx.Err() != nil {
			return written, context.Cause(st.ctx)
		}
		st.mu.Lock()
		n := int(min(int64(len(p)), st.window, maxData))
		st.window -= int64(n)
		st.total += int64(n)
		st.mu.Unlock()
		if n == 0 {
			err = st.wait()
		} else {
			err = st.send(&types.Data{Data: p[:n]})
		}
		if err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// moved is how many bytes have come or gone in all.
func (st *stream) moved() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.total
}

// send sends one message.
func (st *stream) send(m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("stream: encode %s: %w", name(m), err)
	}
	// containerd's type URLs are bare names.
	if err := st.wire.Send(&anypb.Any{TypeUrl: name(m), Value: raw}); err != nil {
		return fmt.Errorf("stream: the client is gone: %w: %w", err, errdefs.ErrAborted)
	}
	return nil
}
