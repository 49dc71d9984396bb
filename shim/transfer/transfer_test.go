package transfer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/transfer/v1"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	cstreaming "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

const patience = time.Minute

// fakeFiles are a container's: what is copied in is kept, what is copied out is made by
// a function.
type fakeFiles struct {
	in  func(ctx context.Context, path string, tar io.Reader) error
	out func(ctx context.Context, path string, tar io.Writer) error
}

func (f fakeFiles) CopyIn(ctx context.Context, path string, tar io.Reader) error {
	return f.in(ctx, path, tar)
}

func (f fakeFiles) CopyOut(ctx context.Context, path string, tar io.Writer) error {
	return f.out(ctx, path, tar)
}

// serve serves one container, "one", and returns a function that connects clients.
func serve(t *testing.T, s *Service) func() *ttrpc.Client {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	s.Register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(t.Context(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		s.Close(ctx)
		if ctx.Err() != nil {
			t.Error("Close did not find its work ended")
		}
		server.Close() //nolint:errcheck // the test is over
		<-served
		if n := s.open.Load(); n != 0 {
			t.Errorf("%d streams are open after the end", n)
		}
	})
	return func() *ttrpc.Client {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c := ttrpc.NewClient(conn)
		t.Cleanup(func() { c.Close() }) //nolint:errcheck // the test is over
		return c
	}
}

func one(files Files) func(string) (Files, error) {
	return func(id string) (Files, error) {
		if id != "one" {
			return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
		}
		return files, nil
	}
}

// archive is a tar of files by name, with the owner.
func archive(t testing.TB, uid int, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, name := range files {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(name)), Mode: 0o640, Uid: uid, Gid: uid, Uname: "somebody", ModTime: time.Unix(1e9, 5e8)}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Size = tar.TypeDir, 0
		}
		h.Format = tar.FormatPAX
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			tw.Write([]byte(name)) //nolint:errcheck // to memory
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// entries lists names and owners of a tar.
func entries(t *testing.T, raw []byte) []string {
	t.Helper()
	var list []string
	for tr := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%s %d:%d%s %s %d", h.Name, h.Uid, h.Gid, h.Uname, body, h.ModTime.UnixMilli()))
	}
}

func open(t *testing.T, c *ttrpc.Client, id string) streaming.Stream {
	t.Helper()
	s, err := proxy.NewStreamCreator(c).Create(t.Context(), id)
	if err != nil {
		t.Fatalf("open stream %s: %v", id, err)
	}
	return s
}

func transfer(ctx context.Context, c *ttrpc.Client, from, to any) error {
	return transferWith(ctx, c, from, to, nil)
}

func transferWith(ctx context.Context, c *ttrpc.Client, from, to any, o *api.TransferOptions) error {
	source, err := typeurl.MarshalAnyToProto(from)
	if err != nil {
		return err
	}
	destination, err := typeurl.MarshalAnyToProto(to)
	if err != nil {
		return err
	}
	_, err = api.NewTTRPCTransferClient(c).Transfer(ctx, &api.TransferRequest{Source: source, Destination: destination, Options: o})
	return errgrpc.ToNative(err)
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestCopyIn(t *testing.T) {
	sent := archive(t, 1000, "a/", "a/b", "c")
	padded := append(slices.Clone(sent), make([]byte, 8<<10)...) // as tar writes it
	for _, tt := range []struct {
		name     string
		tar      []byte
		preserve bool
		want     []string
	}{
		{"with the tar's owners", sent, true, []string{"a/ 1000:1000somebody  1000000000500", "a/b 1000:1000somebody a/b 1000000000500", "c 1000:1000somebody c 1000000000500"}},
		{"padded", padded, true, []string{"a/ 1000:1000somebody  1000000000500", "a/b 1000:1000somebody a/b 1000000000500", "c 1000:1000somebody c 1000000000500"}},
		{"with root as owner", padded, false, []string{"a/ 0:0  1000000000500", "a/b 0:0 a/b 1000000000500", "c 0:0 c 1000000000500"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []byte
			var at string
			c := serve(t, New(one(fakeFiles{in: func(_ context.Context, path string, tar io.Reader) (err error) {
				at = path
				got, err = io.ReadAll(tar)
				return err
			}})))()
			cstreaming.SendStream(within(t), bytes.NewReader(tt.tar), open(t, c, "in"))
			err := transfer(within(t), c, &types.ReadStream{Stream: "in", MediaType: mediaType},
				&types.ContainerPath{ContainerID: "one", Path: "/data", PreserveOwnership: tt.preserve})
			if err != nil {
				t.Fatal(err)
			}
			if list := entries(t, got); at != "/data" || !slices.Equal(list, tt.want) {
				t.Errorf("at %s: %q, want %q", at, list, tt.want)
			}
		})
	}
}

func TestCopyOut(t *testing.T) {
	whole := archive(t, 7, "etc/", "etc/passwd", "etc/group")
	var stopped error
	files := fakeFiles{out: func(ctx context.Context, path string, w io.Writer) error {
		if path != "/etc" {
			_, err := w.Write(archive(t, 7, "hosts"))
			return err
		}
		if _, err := w.Write(whole); err != nil {
			stopped = err
		}
		return nil
	}}
	for _, tt := range []struct {
		name, path string
		shallow    bool
		want       []string
	}{
		{"whole", "/etc", false, []string{"etc/ 7:7somebody  1000000000500", "etc/passwd 7:7somebody etc/passwd 1000000000500", "etc/group 7:7somebody etc/group 1000000000500"}},
		{"the directory alone", "/etc", true, []string{"etc/ 7:7somebody  1000000000500"}},
		{"a file", "/etc/hosts", true, []string{"hosts 7:7somebody hosts 1000000000500"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := serve(t, New(one(files)))()
			stopped = nil
			r := cstreaming.ReceiveStream(within(t), open(t, c, "out"))
			done := make(chan error, 1)
			go func() {
				done <- transfer(within(t), c, &types.ContainerPath{ContainerID: "one", Path: tt.path, NoWalk: tt.shallow},
					&types.WriteStream{Stream: "out", MediaType: mediaType})
			}()
			got, err := io.ReadAll(r)
			if err := errors.Join(err, <-done); err != nil {
				t.Fatal(err)
			}
			if list := entries(t, got); !slices.Equal(list, tt.want) {
				t.Errorf("got %q, want %q", list, tt.want)
			}
			if tt.path == "/etc" && (stopped != nil) != tt.shallow {
				t.Errorf("the container's side ended with %v", stopped)
			}
		})
	}
}

// Much more than a window, both ways at a time, over one connection.
func TestMuchData(t *testing.T) {
	const size = 16 << 20
	block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	var got bytes.Buffer
	c := serve(t, New(one(fakeFiles{
		in: func(_ context.Context, _ string, r io.Reader) error {
			_, err := io.Copy(&got, r)
			return err
		},
		out: func(_ context.Context, _ string, w io.Writer) error {
			for range size / len(block) {
				if _, err := w.Write(block); err != nil {
					return err
				}
			}
			return nil
		},
	})))()
	ctx := within(t)
	sent := append(bytes.Repeat(block, size/len(block)), make([]byte, endMark)...)
	cstreaming.SendStream(ctx, bytes.NewReader(sent), open(t, c, "in"))
	out := cstreaming.ReadByteStream(ctx, open(t, c, "out"))
	done := make(chan error, 2)
	go func() {
		done <- transfer(ctx, c, &types.ReadStream{Stream: "in"}, &types.ContainerPath{ContainerID: "one", PreserveOwnership: true})
	}()
	go func() {
		done <- transfer(ctx, c, &types.ContainerPath{ContainerID: "one"}, &types.WriteStream{Stream: "out"})
	}()
	back, err := io.ReadAll(out)
	if err := errors.Join(err, <-done, <-done); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d bytes in, want the %d that were sent", got.Len(), len(sent))
	}
	if !bytes.Equal(back, sent[:size]) {
		t.Errorf("%d bytes out, want the %d that were written", len(back), size)
	}
}

// The container's side is told of no more than the client has taken.
func TestWindowHoldsTheWriterBack(t *testing.T) {
	written, ended := make(chan int, 1), make(chan error, 1)
	c := serve(t, New(one(fakeFiles{out: func(_ context.Context, _ string, w io.Writer) error {
		n, err := w.Write(make([]byte, 1<<20))
		written <- n
		ended <- err
		return err
	}})))()
	s := open(t, c, "out")
	send(t, s, &types.WindowUpdate{Update: 100_000})
	done := make(chan error, 1)
	go func() {
		done <- transfer(within(t), c, &types.ContainerPath{ContainerID: "one"}, &types.WriteStream{Stream: "out"})
	}()
	for n := 0; n < 100_000; {
		m := recv(t, s)
		d, ok := m.(*types.Data)
		if !ok {
			t.Fatalf("received %T", m)
		}
		n += len(d.Data)
		if n > 100_000 || len(d.Data) > maxData {
			t.Fatalf("received %d bytes, %d of them in one message", n, len(d.Data))
		}
	}
	if err := s.Close(); err != nil { // it does not want more
		t.Fatal(err)
	}
	if n, err := <-written, <-ended; n != 100_000 || !errdefs.IsAborted(err) {
		t.Errorf("%d bytes were written, then %v", n, err)
	}
	if err := <-done; !errdefs.IsAborted(err) {
		t.Errorf("the transfer ended with %v", err)
	}
}

func TestErrorsOfTheGuestReachTheClient(t *testing.T) {
	refusal := fmt.Errorf("entry \"../x\"\nleaves the directory: %w", errdefs.ErrPermissionDenied)
	c := serve(t, New(one(fakeFiles{
		in:  func(context.Context, string, io.Reader) error { return refusal },
		out: func(_ context.Context, _ string, w io.Writer) error { w.Write([]byte("partly")); return refusal }, //nolint:errcheck // as it is
	})))()
	const want = `entry "../x"; leaves the directory`
	check := func(what string, err error) {
		t.Helper()
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s ended with %v", what, err)
		}
	}
	in := open(t, c, "in")
	cstreaming.SendStream(within(t), bytes.NewReader(archive(t, 0, "x")), in)
	check("copy in", transfer(within(t), c, &types.ReadStream{Stream: "in"}, &types.ContainerPath{ContainerID: "one", Path: "/p"}))

	out := cstreaming.ReadByteStream(within(t), open(t, c, "out"))
	done := make(chan error, 1)
	go func() {
		done <- transfer(within(t), c, &types.ContainerPath{ContainerID: "one", Path: "/p"}, &types.WriteStream{Stream: "out"})
	}()
	got, err := io.ReadAll(out)
	check("copy out", <-done)
	check("its stream", err)
	if string(got) != "partly" {
		t.Errorf("received %q", got)
	}

	shallow := cstreaming.ReadByteStream(within(t), open(t, c, "shallow"))
	go func() {
		done <- transfer(within(t), c, &types.ContainerPath{ContainerID: "one", Path: "/none", NoWalk: true}, &types.WriteStream{Stream: "shallow"})
	}()
	io.Copy(io.Discard, shallow) //nolint:errcheck // the transfer tells
	if err := <-done; !errdefs.IsPermissionDenied(err) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("a shallow copy ended with %v", err)
	}
}

// A tar that is cut short does not pass for whole: neither between two entries.
func TestTruncatedTar(t *testing.T) {
	whole := archive(t, 0, "a", "b")
	for _, preserve := range []bool{false, true} {
		for _, length := range []int{0, 100, len(whole) / 2, len(whole) - endMark, len(whole) - 1} {
			t.Run(fmt.Sprint(length, preserve), func(t *testing.T) {
				c := serve(t, New(one(fakeFiles{in: func(_ context.Context, _ string, r io.Reader) error {
					_, err := io.Copy(io.Discard, r)
					return err
				}})))()
				cstreaming.SendStream(within(t), bytes.NewReader(whole[:length]), open(t, c, "in"))
				err := transfer(within(t), c, &types.ReadStream{Stream: "in"}, &types.ContainerPath{ContainerID: "one", PreserveOwnership: preserve})
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "it was cut short") {
					t.Errorf("got %v", err)
				}
			})
		}
	}
}

// The container's side ends when its client is gone, whichever way the bytes go.
func TestClientGone(t *testing.T) {
	for _, in := range []bool{true, false} {
		t.Run(fmt.Sprint("in=", in), func(t *testing.T) {
			began, ended := make(chan struct{}), make(chan error, 1)
			wait := func(ctx context.Context) error {
				close(began)
				<-ctx.Done()
				ended <- context.Cause(ctx)
				return ctx.Err()
			}
			c := serve(t, New(one(fakeFiles{
				in:  func(ctx context.Context, _ string, _ io.Reader) error { return wait(ctx) },
				out: func(ctx context.Context, _ string, _ io.Writer) error { return wait(ctx) },
			})))()
			open(t, c, "s")
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() {
				if in {
					transfer(within(t), c, &types.ReadStream{Stream: "s"}, &types.ContainerPath{ContainerID: "one"}) //nolint:errcheck // its connection goes
				} else {
					transfer(within(t), c, &types.ContainerPath{ContainerID: "one"}, &types.WriteStream{Stream: "s"}) //nolint:errcheck // likewise
				}
			})
			<-began
			c.Close() //nolint:errcheck // what is tested
			select {
			case <-ended:
			case <-time.After(patience):
				t.Error("the copy goes on")
			}
		})
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	connect := serve(t, New(one(fakeFiles{})))
	c := connect()
	at := &types.ContainerPath{ContainerID: "one", Path: "/"}
	for _, tt := range []struct {
		name     string
		from, to any
		is       func(error) bool
		text     string
	}{
		{"a container that is not there", &types.ReadStream{Stream: "s"}, &types.ContainerPath{ContainerID: "two"}, errdefs.IsNotFound, `task "two"`},
		{"a stream that is not there", &types.ReadStream{Stream: "other"}, at, errdefs.IsNotFound, `stream "other" was not opened`},
		{"another media type", at, &types.WriteStream{Stream: "s", MediaType: "text/plain"}, errdefs.IsNotImplemented, `media type "text/plain"`},
		{"a stream to a stream", &types.ReadStream{Stream: "s"}, &types.WriteStream{Stream: "s"}, errdefs.IsNotImplemented, "a shim copies from"},
		{"an image", &types.ImageStore{Name: "x"}, at, errdefs.IsNotImplemented, `"containerd.types.transfer.ImageStore"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := connect()
			defer c.Close() //nolint:errcheck // the test is over
			// The last one's may be there still.
			id := tt.name
			if from, ok := tt.from.(*types.ReadStream); ok && from.Stream == "s" {
				from.Stream = id
			}
			if to, ok := tt.to.(*types.WriteStream); ok {
				to.Stream = id
			}
			open(t, c, id)
			if err := transfer(within(t), c, tt.from, tt.to); !tt.is(err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v", err)
			}
		})
	}
	_, err := api.NewTTRPCTransferClient(c).Transfer(within(t), &api.TransferRequest{})
	if !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("an empty request: %v", err)
	}
	_, err = api.NewTTRPCTransferClient(c).Transfer(within(t), &api.TransferRequest{
		Source:      &anypb.Any{TypeUrl: "containerd.types.transfer.ReadStream", Value: []byte{0xff}},
		Destination: &anypb.Any{TypeUrl: "containerd.types.transfer.ContainerPath"},
	})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("a broken message: %v", err)
	}
}

func TestProgress(t *testing.T) {
	raw := archive(t, 0, "x")
	c := serve(t, New(one(fakeFiles{in: func(_ context.Context, _ string, r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	}})))()
	cstreaming.SendStream(within(t), bytes.NewReader(raw), open(t, c, "in"))
	progress := open(t, c, "progress")
	err := transferWith(within(t), c, &types.ReadStream{Stream: "in"}, &types.ContainerPath{ContainerID: "one", Path: "/p"},
		&api.TransferOptions{ProgressStream: "progress"})
	if err != nil {
		t.Fatal(err)
	}
	p, ok := recv(t, progress).(*types.Progress)
	if !ok || p.Event != "copied" || p.Name != "/p" || p.Progress != int64(len(raw)) {
		t.Errorf("told %v", p)
	}
	if _, err := progress.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream of progress ended with %v", err)
	}
}

func send(t *testing.T, s streaming.Stream, m any) {
	t.Helper()
	a, err := typeurl.MarshalAny(m)
	if err == nil {
		err = s.Send(a)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func recv(t *testing.T, s streaming.Stream) any {
	t.Helper()
	a, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	m, err := typeurl.UnmarshalAny(a)
	if err != nil {
		t.Fatal(err)
	}
	return m
}
