package cp

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	api "github.com/containerd/containerd/api/services/transfer/v1"
	state "github.com/containerd/containerd/api/types/task"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	tstreaming "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"

	"github.com/husk-containers/husk/internal/statedir"
)

const (
	mediaType = "application/x-tar"
	// askTimeout bounds the question to a shim whether it has the container.
	askTimeout = 5 * time.Second
	// maxLinks is how many symbolic links a path may go through, as in Linux.
	maxLinks = 40
	// maxPadding is what may follow the end of a tar, in bytes. GNU tar pads to 10 KiB.
	maxPadding = 1 << 20
)

// A remote is a container, by its shim.
type remote struct {
	client    *ttrpc.Client
	container string
}

func (r *remote) Close() error { return r.client.Close() }

// find asks the shims of the namespace for a container that has not ended.
func find(ctx context.Context, dir, namespace, container string) (*remote, error) {
	shims, err := statedir.Shims(dir, namespace)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, shim := range shims {
		r, err := ask(ctx, shim.Address, container)
		switch {
		case err == nil:
			return r, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errdefs.IsFailedPrecondition(err):
			return nil, err
		case !errdefs.IsNotFound(err):
			errs = append(errs, fmt.Errorf("sandbox %s does not answer: %w", shim.Sandbox, err))
		}
	}
	err = fmt.Errorf("no container %q in namespace %q, of %d sandboxes in %s: give its whole id, and its namespace by -n (k8s.io for Kubernetes): %w",
		container, namespace, len(shims), dir, errdefs.ErrNotFound)
	return nil, errors.Join(append(errs, err)...)
}

// ask connects to a shim that has the container, or is NotFound.
func ask(ctx context.Context, address, container string) (*remote, error) {
	actx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(actx, "unix", address)
	if err != nil {
		return nil, err
	}
	r := &remote{client: ttrpc.NewClient(conn), container: container}
	resp, err := task.NewTTRPCTaskClient(r.client).State(actx, &task.StateRequest{ID: container})
	switch err = errgrpc.ToNative(err); {
	case err == nil && resp.Status == state.Status_STOPPED:
		err = fmt.Errorf("container %q has ended: only of one that runs are the files within reach: %w", container, errdefs.ErrFailedPrecondition)
	case err == nil:
		return r, nil
	}
	return nil, errors.Join(err, r.Close())
}

// transfer calls the transfer service.
func (r *remote) transfer(ctx context.Context, source, destination any) error {
	from, err := typeurl.MarshalAnyToProto(source)
	if err != nil {
		return err
	}
	to, err := typeurl.MarshalAnyToProto(destination)
	if err != nil {
		return err
	}
	_, err = api.NewTTRPCTransferClient(r.client).Transfer(ctx, &api.TransferRequest{Source: from, Destination: to})
	err = errgrpc.ToNative(err)
	if errdefs.IsNotImplemented(err) {
		return fmt.Errorf("the container's shim cannot copy, as one of an older build: %w", err)
	}
	return err
}

func (r *remote) stream(ctx context.Context) (string, streaming.Stream, error) {
	id := tstreaming.GenerateID("husk-cp")
	s, err := proxy.NewStreamCreator(r.client).Create(ctx, id)
	if err != nil {
		return "", nil, fmt.Errorf("open a stream to the container's shim: %w", err)
	}
	return id, s, nil
}

// in has produce write a tar, which is extracted in the container's directory at path.
func (r *remote) in(ctx context.Context, path string, produce func(io.Writer) error) error {
	id, stream, err := r.stream(ctx)
	if err != nil {
		return err
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer cancel() // nobody reads any more
		done <- r.transfer(ctx, &types.ReadStream{Stream: id, MediaType: mediaType},
			&types.ContainerPath{ContainerID: r.container, Path: path, PreserveOwnership: true})
	}()
	err = produce(tstreaming.WriteByteStream(wctx, stream))
	switch {
	case err == nil:
		if err := stream.Close(); err != nil {
			return errors.Join(err, r.Close(), <-done)
		}
		return <-done
	case wctx.Err() != nil && ctx.Err() == nil: // it has ended first, and says why
		return <-done
	}
	// To close the stream would say that the tar is whole.
	r.Close() //nolint:errcheck // the end that it brings is the transfer's
	<-done
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// out has consume read the tar of what is at path in the container; with shallow of a
// directory itself.
func (r *remote) out(ctx context.Context, path string, shallow bool, consume func(io.Reader) error) error {
	id, stream, err := r.stream(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- r.transfer(ctx, &types.ContainerPath{ContainerID: r.container, Path: path, NoWalk: shallow},
			&types.WriteStream{Stream: id, MediaType: mediaType})
	}()
	from := &noted{Reader: tstreaming.ReadByteStream(ctx, stream)}
	err = consume(from)
	if err == nil {
		var n int64
		if n, err = io.Copy(io.Discard, io.LimitReader(from, maxPadding)); n == maxPadding {
			err = fmt.Errorf("the container's tar does not end: %w", errdefs.ErrPermissionDenied)
		}
	}
	if err == nil || from.err != nil {
		// Why the stream has ended says the transfer.
		if terr := <-done; terr != nil || err == nil {
			return terr
		}
		return err
	}
	cerr := stream.Close() // it ends the transfer, of which cancel does not tell the shim
	cancel()
	<-done
	return errors.Join(err, cerr)
}

// noted is a reader whose error is kept, but for its end.
type noted struct {
	io.Reader
	err error
}

func (n *noted) Read(p []byte) (int, error) {
	c, err := n.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		n.err = err
	}
	return c, err
}

// errSeen ends the copy of a file of which only the header is wanted.
var errSeen = errors.New("seen")

// stat follows symbolic links from path. It returns where they lead and what is there:
// Missing, where nothing is.
func (r *remote) stat(ctx context.Context, p string) (string, presence, error) {
	for range maxLinks {
		if p == "/" {
			return p, isDirectory, nil
		}
		var h *tar.Header
		err := r.out(ctx, p, true, func(from io.Reader) (err error) {
			if h, err = tar.NewReader(from).Next(); err == nil {
				err = errSeen
			}
			return err
		})
		switch {
		case errdefs.IsNotFound(err):
			return p, missing, nil
		case !errors.Is(err, errSeen):
			return "", 0, err
		case h.Typeflag == tar.TypeDir:
			return p, isDirectory, nil
		case h.Typeflag != tar.TypeSymlink:
			return p, isFile, nil
		case strings.HasPrefix(h.Linkname, "/"):
			p = absolute(h.Linkname)
		default:
			p = absolute(path.Join(path.Dir(p), h.Linkname))
		}
	}
	return "", 0, fmt.Errorf("%s in the container: too many symbolic links: %w", p, errdefs.ErrInvalidArgument)
}
