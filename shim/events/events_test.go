package events

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A daemon is containerd's end.
type daemon struct {
	got    chan *types.Envelope
	refuse string // a topic
	server *ttrpc.Server
	ended  chan struct{}
}

func (d *daemon) Forward(_ context.Context, r *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	if r.Envelope.Topic == d.refuse {
		return nil, status.Error(codes.InvalidArgument, "no such topic")
	}
	d.got <- r.Envelope
	return &emptypb.Empty{}, nil
}

func (d *daemon) stop() {
	d.server.Close() //nolint:errcheck // its clients see it
	<-d.ended
}

func serve(t *testing.T, path, refuse string) *daemon {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{got: make(chan *types.Envelope, capacity), refuse: refuse, ended: make(chan struct{})}
	if d.server, err = ttrpc.NewServer(); err != nil {
		t.Fatal(err)
	}
	ttrpcevents.RegisterTTRPCEventsService(d.server, d)
	go func() {
		defer close(d.ended)
		d.server.Serve(context.Background(), l) //nolint:errcheck // stop ends it
	}()
	return d
}

func (d *daemon) next(t *testing.T) *types.Envelope {
	t.Helper()
	select {
	case env := <-d.got:
		return env
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	case <-time.After(30 * time.Second):
		t.Fatal("no event came")
	}
	return nil
}

func publisher(t *testing.T, path string) *Publisher {
	t.Helper()
	p, err := NewPublisher(path, "k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		p.Close(ctx) //nolint:errcheck // tests look themselves
	})
	return p
}

func TestEveryEventHasItsTopic(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	d := serve(t, path, "")
	defer d.stop()
	p := publisher(t, path)
	for _, tt := range []struct {
		ev    Event
		topic string
	}{
		{&events.TaskCreate{ContainerID: "c", Bundle: "/b"}, "/tasks/create"},
		{&events.TaskStart{ContainerID: "c", Pid: 7}, "/tasks/start"},
		{&events.TaskExecAdded{ContainerID: "c", ExecID: "e"}, "/tasks/exec-added"},
		{&events.TaskExecStarted{ContainerID: "c", ExecID: "e"}, "/tasks/exec-started"},
		{&events.TaskOOM{ContainerID: "c"}, "/tasks/oom"},
		{&events.TaskPaused{ContainerID: "c"}, "/tasks/paused"},
		{&events.TaskResumed{ContainerID: "c"}, "/tasks/resumed"},
		{&events.TaskExit{ContainerID: "c", ID: "e", ExitStatus: 1}, "/tasks/exit"},
		{&events.TaskDelete{ContainerID: "c"}, "/tasks/delete"},
	} {
		p.Publish(tt.ev)
		env := d.next(t)
		back := proto.Clone(tt.ev)
		proto.Reset(back)
		if err := proto.Unmarshal(env.Event.Value, back); err != nil || !proto.Equal(back, tt.ev) {
			t.Errorf("%T arrived as %v, %v", tt.ev, back, err)
		}
		want := "containerd.events." + strings.TrimPrefix(fmt.Sprintf("%T", tt.ev), "*events.")
		if env.Topic != tt.topic || env.Namespace != "k8s.io" || env.Event.TypeUrl != want || env.Timestamp == nil {
			t.Errorf("%T went out as %v", tt.ev, env)
		}
	}
	p.Publish(&events.TaskCheckpointed{ContainerID: "c"}) // not ours: told to the log
	p.Publish(&events.TaskOOM{ContainerID: "c"})
	if env := d.next(t); env.Topic != "/tasks/oom" {
		t.Errorf("an event without topic went out: %v", env)
	}
}

// Order, and every event once, over a containerd that is not there yet and one
// that goes away and comes back. That which it went away over, before it answered,
// comes again.
func TestOrderOverRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	p := publisher(t, path)
	next := uint32(0)
	publish := func(n int) {
		for range n {
			p.Publish(&events.TaskStart{Pid: next})
			next++
		}
	}
	seen := uint32(0)
	expect := func(d *daemon, n int) {
		t.Helper()
		for i, end := 0, seen+uint32(n); seen < end; i++ {
			var ev events.TaskStart
			err := proto.Unmarshal(d.next(t).Event.Value, &ev)
			if err == nil && i == 0 && ev.Pid+1 == seen {
				continue
			}
			if err != nil || ev.Pid != seen {
				t.Fatalf("event %d, %v, want %d", ev.Pid, err, seen)
			}
			seen++
		}
	}
	publish(50)
	d := serve(t, path, "")
	expect(d, 50)
	publish(200)
	expect(d, 200)
	d.stop()
	publish(50)
	d = serve(t, path, "")
	defer d.stop()
	publish(50)
	expect(d, 100)
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	p.Publish(&events.TaskStart{}) // after Close: nowhere
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestARefusedEventHoldsNothingBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	d := serve(t, path, "/tasks/start")
	defer d.stop()
	p := publisher(t, path)
	p.Publish(&events.TaskStart{})
	p.Publish(&events.TaskOOM{})
	if env := d.next(t); env.Topic != "/tasks/oom" {
		t.Errorf("got %v", env)
	}
}

func TestCloseDelivers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	d := serve(t, path, "")
	defer d.stop()
	p := publisher(t, path)
	for range 100 {
		p.Publish(&events.TaskOOM{})
	}
	if err := p.Close(t.Context()); err != nil || len(d.got) != 100 {
		t.Errorf("Close: %v with %d events delivered, want 100", err, len(d.got))
	}
}

func TestCloseGivesUpInTime(t *testing.T) {
	p := publisher(t, filepath.Join(t.TempDir(), "nobody"))
	for range capacity + 5 {
		p.Publish(&events.TaskOOM{})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := p.Close(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), fmt.Sprint(capacity)) {
		t.Errorf("Close: %v, want a deadline and %d events", err, capacity)
	}
}

func TestNoAddress(t *testing.T) {
	if _, err := NewPublisher("", "default"); err == nil {
		t.Error("a publisher to nowhere was made")
	}
}
