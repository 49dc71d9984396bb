// Package transfer serves containerd's transfer and streaming services for the files
// of a shim's containers: tar streams into and out of them.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	streaming "github.com/containerd/containerd/api/services/streaming/v1"
	api "github.com/containerd/containerd/api/services/transfer/v1"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Files are those of one container. Their errors name what they are about.
type Files interface {
	// CopyIn extracts a tar into the directory at path, which must exist.
	CopyIn(ctx context.Context, path string, tar io.Reader) error
	// CopyOut writes the tar of what is at path. Its first entry is named by the
	// last element of path.
	CopyOut(ctx context.Context, path string, tar io.Writer) error
}

// A Service serves both services. A client first opens a stream under an id of its
// own, and then names the stream and a container's path in a Transfer:
//
//	Stream    StreamInit{id}                         -->
//	                                                 <-- Empty
//	Transfer  ReadStream{id} to ContainerPath        -->   (copy in)
//	                                                 <-- WindowUpdate
//	          Data, ..., close                       -->
//	                                                 <-- the Transfer's answer, close
//
//	Transfer  ContainerPath to WriteStream{id}       -->   (copy out)
//	          WindowUpdate                           -->
//	                                                 <-- Data, ..., close, the Transfer's answer
//
// Data goes no further than its receiver's window. A stream that ends with an error
// ends with the Transfer's.
type Service struct {
	find func(id string) (Files, error)
	// claimTimeout is how long a stream may wait for its id, and then for its Transfer.
	claimTimeout time.Duration

	// life ends with Close, which then waits for work.
	life context.Context //nolint:containedctx // the lifetime of the streams
	end  context.CancelCauseFunc
	work sync.WaitGroup

	open atomic.Int32 // streams, those without an id yet included

	mu      sync.Mutex
	streams map[string]*stream // by the ids that clients gave them
}

// New returns the service of the containers that find returns, by their ids.
func New(find func(id string) (Files, error)) *Service {
	life, end := context.WithCancelCause(context.Background())
	return &Service{find: find, claimTimeout: claimTimeout, life: life, end: end, streams: map[string]*stream{}}
}

// Register puts both services on a server.
func (s *Service) Register(server *ttrpc.Server) {
	api.RegisterTTRPCTransferService(server, s)
	streaming.RegisterTTRPCStreamingService(server, s)
}

// Close ends every stream and transfer, and returns when they have ended or ctx has.
// None begins from then on.
func (s *Service) Close(ctx context.Context) {
	s.mu.Lock() // begin adds to the work under it
	s.end(fmt.Errorf("the shim is shutting down: %w", errdefs.ErrUnavailable))
	s.mu.Unlock()
	idle := make(chan struct{})
	go func() { // ends with the work, which a client that does not read may hold up until the process ends
		defer close(idle)
		s.work.Wait()
	}()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// begin has Close wait for one more piece of work, unless Close has come first.
func (s *Service) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return context.Cause(s.life)
	}
	s.work.Add(1)
	return nil
}

// Transfer copies between a stream and a path in a container.
func (s *Service) Transfer(ctx context.Context, r *api.TransferRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, status(s.transfer(ctx, r))
}

func (s *Service) transfer(ctx context.Context, r *api.TransferRequest) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.work.Done()
	var read types.ReadStream
	var write types.WriteStream
	var path types.ContainerPath
	var err error
	in := r.Destination.MessageIs(&path)
	switch {
	case in && r.Source.MessageIs(&read):
		err = errors.Join(decode(r.Source, &read), decode(r.Destination, &path))
	case r.Source.MessageIs(&path) && r.Destination.MessageIs(&write):
		err = errors.Join(decode(r.Source, &path), decode(r.Destination, &write))
	default:
		err = fmt.Errorf("transfer from %q to %q: a shim copies from %[3]s to %[4]s, and from %[4]s to %[5]s: %[6]w",
			r.Source.GetTypeUrl(), r.Destination.GetTypeUrl(), name(&read), name(&path), name(&write), errdefs.ErrNotImplemented)
	}
	if err != nil {
		return err
	}
	// One of the two is empty.
	st, err := s.claim(read.Stream+write.Stream, !in)
	if err != nil {
		return err
	}
	if media := read.MediaType + write.MediaType; media != "" && media != mediaType {
		err = fmt.Errorf("media type %q, want %s: %w", media, mediaType, errdefs.ErrNotImplemented)
	}
	var progress *stream // nil: the client does not want to hear of it
	if id := r.Options.GetProgressStream(); err == nil && id != "" {
		progress, err = s.claim(id, true)
	}
	if err == nil {
		err = s.run(ctx, st, func(ctx context.Context) error {
			if in {
				return s.copyIn(ctx, &path, st)
			}
			return s.copyOut(ctx, &path, st)
		})
	}
	st.finish(err)
	if progress == nil {
		return err
	}
	if n := st.moved(); err == nil {
		progress.send(&types.Progress{Event: "copied", Name: path.Path, Progress: n, Total: n}) //nolint:errcheck // a courtesy
	}
	progress.finish(err)
	return err
}

// run runs do until it ends, its client leaves, its stream ends or the service.
func (s *Service) run(ctx context.Context, st *stream, do func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(st.ctx, func() { cancel(context.Cause(st.ctx)) })()
	err := do(ctx)
	if cause := context.Cause(st.ctx); err != nil && cause != nil {
		return cause // of which err is but a consequence
	}
	return err
}

func (s *Service) copyIn(ctx context.Context, p *types.ContainerPath, st *stream) error {
	files, err := s.find(p.ContainerID)
	if err != nil {
		return err
	}
	if err := st.grant(window); err != nil {
		return err
	}
	var tar io.Reader = &whole{r: st}
	if !p.PreserveOwnership {
		source := tar
		r, w := io.Pipe()
		defer r.Close() //nolint:errcheck // it ends who writes there, who else waits for the stream, which ends too
		s.work.Go(func() { w.CloseWithError(disown(source, w)) })
		tar = r
	}
	return files.CopyIn(ctx, p.Path, tar)
}

func (s *Service) copyOut(ctx context.Context, p *types.ContainerPath, st *stream) error {
	files, err := s.find(p.ContainerID)
	if err != nil {
		return err
	}
	copyOut := files.CopyOut
	if p.NoWalk {
		copyOut = shallow(copyOut)
	}
	return copyOut(ctx, p.Path, st)
}

func decode(a *anypb.Any, m proto.Message) error {
	if err := a.UnmarshalTo(m); err != nil {
		return fmt.Errorf("decode %s: %w: %w", name(m), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func name(m proto.Message) string { return string(m.ProtoReflect().Descriptor().FullName()) }

// status is err as a ttrpc client is to get it, in one line. A cancelled stream would be
// taken for one that ended in order.
func status(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("%v: %w", err, errdefs.ErrAborted) //nolint:errorlint // so that it is Aborted alone
	}
	return errgrpc.ToGRPC(oneLine{err})
}

// oneLine is an error whose text fits a client's line.
type oneLine struct{ error }

func (e oneLine) Error() string {
	return strings.ReplaceAll(strings.TrimSpace(e.error.Error()), "\n", "; ")
}
func (e oneLine) Unwrap() error { return e.error }
