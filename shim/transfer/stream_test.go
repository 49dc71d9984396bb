package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	cstreaming "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

func TestStreamsAreLimited(t *testing.T) {
	connect := serve(t, New(one(fakeFiles{})))
	c := connect()
	for i := range maxStreams {
		open(t, c, fmt.Sprint("s", i))
	}
	if _, err := proxy.NewStreamCreator(connect()).Create(within(t), "more"); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "64 are open") {
		t.Errorf("one more: %v", err)
	}
}

// Streams that nobody uses end by themselves, whether they were given an id or not,
// and so make room.
func TestUnusedStreamsTimeOut(t *testing.T) {
	s := New(one(fakeFiles{}))
	s.claimTimeout = time.Second
	c := serve(t, s)()
	silent, err := streamingapi.NewTTRPCStreamingClient(c).Stream(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := silent.Recv(); !errors.Is(errgrpc.ToNative(err), context.DeadlineExceeded) || !strings.Contains(err.Error(), "first message") {
		t.Errorf("without an id: %v", err)
	}
	if _, err := open(t, c, "unused").Recv(); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no transfer has used it") {
		t.Errorf("with one: %v", err)
	}
	if err := transfer(within(t), c, &types.ReadStream{Stream: "unused"}, &types.ContainerPath{ContainerID: "one"}); !errdefs.IsNotFound(err) {
		t.Errorf("used too late: %v", err)
	}
}

// A transfer may last: the time for a claim is not its own.
func TestClaimedStreamsDoNotTimeOut(t *testing.T) {
	s := New(one(fakeFiles{in: func(ctx context.Context, _ string, r io.Reader) error {
		buf := make([]byte, endMark)
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(3 * time.Second): // beyond the time for a claim
			return nil
		}
	}}))
	s.claimTimeout = 2 * time.Second
	c := serve(t, s)()
	cstreaming.SendStream(within(t), bytes.NewReader(archive(t, 0, "x")), open(t, c, "in"))
	if err := transfer(within(t), c, &types.ReadStream{Stream: "in"}, &types.ContainerPath{ContainerID: "one", PreserveOwnership: true}); err != nil {
		t.Error(err)
	}
}

func TestIDs(t *testing.T) {
	c := serve(t, New(one(fakeFiles{})))()
	create := func(id string) error {
		_, err := proxy.NewStreamCreator(c).Create(within(t), id)
		return err
	}
	if err := create("s"); err != nil {
		t.Fatal(err)
	}
	if err := create("s"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same id: %v", err)
	}
	for _, id := range []string{"", strings.Repeat("x", maxID+1)} {
		if err := create(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id of %d bytes: %v", len(id), err)
		}
	}
}

// A client that does not keep to the protocol loses its stream, before it has cost more
// than a window; the others go on.
func TestClientsThatDoNotKeepToTheProtocol(t *testing.T) {
	began := make(chan struct{}, 1)
	c := serve(t, New(one(fakeFiles{in: func(ctx context.Context, _ string, _ io.Reader) error {
		began <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}})))()
	for _, tt := range []struct {
		name  string
		claim bool
		send  any
		text  string
	}{
		{"data before its window", false, &types.Data{Data: []byte("x")}, "1 bytes were sent where the window has 0"},
		{"data beyond its window", true, &types.Data{Data: make([]byte, window+1)}, "bytes were sent where the window has 131072"},
		{"a window that shrinks", false, &types.WindowUpdate{Update: -1}, "shrinks by -1"},
		{"another message", false, &types.Progress{}, "Progress"},
		{"a second init", false, &streamingapi.StreamInit{ID: "x"}, "StreamInit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, c, tt.name)
			done := make(chan error, 1)
			if tt.claim {
				go func() {
					done <- transfer(within(t), c, &types.ReadStream{Stream: tt.name}, &types.ContainerPath{ContainerID: "one"})
				}()
				<-began
				if m, ok := recv(t, s).(*types.WindowUpdate); !ok || m.Update != window {
					t.Fatalf("the window is %v", m)
				}
			}
			send(t, s, tt.send)
			if _, err := s.Recv(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("the stream ended with %v", err)
			}
			if tt.claim {
				if err := <-done; !errdefs.IsInvalidArgument(err) {
					t.Errorf("the transfer ended with %v", err)
				}
			}
		})
	}
}

func TestWindowDoesNotOverflow(t *testing.T) {
	st := &stream{changed: make(chan struct{}, 1)}
	for range 3 {
		if err := st.take(&anypb.Any{TypeUrl: name(&types.WindowUpdate{}), Value: []byte{0x08, 0xff, 0xff, 0xff, 0xff, 0x07}}); err != nil {
			t.Fatal(err)
		}
		if st.window != math.MaxInt32 {
			t.Fatalf("the window is %d", st.window)
		}
	}
}

func TestCloseEndsTransfers(t *testing.T) {
	began := make(chan struct{})
	s := New(one(fakeFiles{out: func(ctx context.Context, _ string, _ io.Writer) error {
		close(began)
		<-ctx.Done()
		return context.Cause(ctx)
	}}))
	c := serve(t, s)()
	unused, used := open(t, c, "unused"), open(t, c, "used")
	done := make(chan error, 1)
	go func() {
		done <- transfer(within(t), c, &types.ContainerPath{ContainerID: "one"}, &types.WriteStream{Stream: "used"})
	}()
	<-began
	s.Close(within(t))
	if err := <-done; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("the transfer ended with %v", err)
	}
	for _, stream := range []streaming.Stream{unused, used} {
		if _, err := stream.Recv(); !errdefs.IsUnavailable(err) {
			t.Errorf("a stream ended with %v", err)
		}
	}
	if _, err := proxy.NewStreamCreator(c).Create(within(t), "late"); !errdefs.IsUnavailable(err) {
		t.Errorf("a stream after the end: %v", err)
	}
}

// Whatever a guest calls a tar, the client of a shallow copy gets one entry or an error.
func FuzzFirst(f *testing.F) {
	f.Add(archive(f, 1, "a/", "a/b"))
	f.Add(archive(f, 1, strings.Repeat("long/", 60)+"name"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var out bytes.Buffer
		if first(bytes.NewReader(raw), &out) != nil {
			return
		}
		if n := len(entries(t, out.Bytes())); n != 1 {
			t.Errorf("%d entries", n)
		}
	})
}

// What a client sends in a stream is its own loss.
func FuzzTake(f *testing.F) {
	f.Add(name(&types.Data{}), []byte{0x0a, 1, 'x'})
	f.Add(name(&types.WindowUpdate{}), []byte{0x08, 1})
	f.Add(name(&emptypb.Empty{}), []byte{})
	f.Fuzz(func(t *testing.T, url string, raw []byte) {
		st := &stream{changed: make(chan struct{}, 1), credit: 8}
		for range 2 {
			st.take(&anypb.Any{TypeUrl: url, Value: raw}) //nolint:errcheck // any answer will do
		}
		if st.buffer.Len() > 8 || st.credit < 0 || st.window < 0 {
			t.Errorf("%d bytes are held, %d granted; window %d", st.buffer.Len(), st.credit, st.window)
		}
	})
}
