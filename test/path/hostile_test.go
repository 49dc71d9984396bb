package path_test

import (
	"context"
	"errors"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

// A hostile guest takes every container and runs none. What it is not told to
// answer, it never answers.
type hostile struct {
	agentv1.AgentService
	exits  chan *agentv1.WaitProcessResponse // the answers to WaitProcess
	list   *agentv1.ListProcessesResponse
	events func(agentv1.Agent_WatchEventsServer) error
	// deaf to SignalProcess, RemoveContainer and Shutdown.
	deaf    bool
	polite  bool          // answers when asked whether it lives
	request time.Duration // request_timeout, where not the default

	mu      sync.Mutex
	streams map[stream.Token]net.Conn
	stdout  net.Conn // of the container
}

func (g *hostile) OnlineResources(ctx context.Context, _ *agentv1.OnlineResourcesRequest) (*agentv1.OnlineResourcesResponse, error) {
	if g.polite {
		return &agentv1.OnlineResourcesResponse{Cpus: 1}, nil
	}
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// newHostile starts a shim over a hostile guest, with short time-outs.
func newHostile(t *testing.T, g *hostile) *host {
	t.Helper()
	g.exits = make(chan *agentv1.WaitProcessResponse, 1)
	g.streams = map[stream.Token]net.Conn{}
	return newHost(t, false, []string{"true"}, func(h *host, l *hypertest.Loopback) {
		h.config.Runtime.StopTimeout = config.Duration{Duration: 200 * time.Millisecond}
		h.config.Runtime.DrainTimeout = config.Duration{Duration: 300 * time.Millisecond}
		if g.request > 0 {
			h.config.Runtime.RequestTimeout = config.Duration{Duration: g.request}
		}
		l.Guest = g.serve
	})
}

func (g *hostile) serve(ctx context.Context, end *hypertest.GuestEnd) error {
	streams, err := end.Listen(stream.Port)
	if err != nil {
		return err
	}
	control, err := end.DialControl(ctx)
	if err != nil {
		return err
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	agentv1.RegisterAgentService(srv, g)
	var work sync.WaitGroup
	work.Go(func() { g.accept(streams) })
	l := &oneConn{ctx: ctx, conn: make(chan net.Conn, 1)}
	l.conn <- control
	work.Go(func() { srv.Serve(ctx, l) }) //nolint:errcheck // ends by Close
	<-ctx.Done()
	srv.Close() //nolint:errcheck // nothing is lost
	work.Wait()
	return nil
}

func (g *hostile) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		token, err := stream.ReadToken(conn)
		if err != nil {
			continue
		}
		g.mu.Lock()
		g.streams[token] = conn
		g.mu.Unlock()
		stream.Answer(conn, true) //nolint:errcheck // the host has gone
	}
}

// A oneConn is a listener for one connection.
type oneConn struct {
	ctx  context.Context //nolint:containedctx // the guest's life
	conn chan net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

func (g *hostile) Hello(context.Context, *agentv1.HelloRequest) (*agentv1.HelloResponse, error) {
	return &agentv1.HelloResponse{}, nil
}

func (g *hostile) Configure(context.Context, *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	return &agentv1.ConfigureResponse{}, nil
}

func (g *hostile) CreateContainer(_ context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	if token, err := stream.ParseToken(r.GetStreams().GetStdout()); err == nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.stdout = g.streams[token]
	}
	return &agentv1.CreateContainerResponse{Pid: 1}, nil
}

func (g *hostile) StartContainer(context.Context, *agentv1.StartContainerRequest) (*agentv1.StartContainerResponse, error) {
	return &agentv1.StartContainerResponse{}, nil
}

func (g *hostile) WaitProcess(ctx context.Context, _ *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	select {
	case r := <-g.exits:
		return r, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (g *hostile) answer(ctx context.Context) error {
	if g.deaf {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (g *hostile) SignalProcess(ctx context.Context, _ *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	return &agentv1.SignalProcessResponse{}, g.answer(ctx)
}

func (g *hostile) RemoveContainer(ctx context.Context, _ *agentv1.RemoveContainerRequest) (*agentv1.RemoveContainerResponse, error) {
	return &agentv1.RemoveContainerResponse{}, g.answer(ctx)
}

func (g *hostile) Shutdown(ctx context.Context, _ *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	return &agentv1.ShutdownResponse{}, g.answer(ctx)
}

func (g *hostile) ListProcesses(context.Context, *agentv1.ListProcessesRequest) (*agentv1.ListProcessesResponse, error) {
	return g.list, nil
}

func (g *hostile) WatchEvents(ctx context.Context, _ *agentv1.WatchEventsRequest, s agentv1.Agent_WatchEventsServer) error {
	if g.events != nil {
		return g.events(s)
	}
	<-ctx.Done()
	return ctx.Err()
}

// within fails where f takes far longer than what bounds it: the test's time-outs
// are some hundred milliseconds, the defaults many seconds.
func within(t *testing.T, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

func (h *host) kill() error {
	_, err := h.Kill(h.t.Context(), &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGKILL), All: true})
	return err
}

func TestAKillEndsAGuestThatDoesNotTellOfTheExit(t *testing.T) {
	for name, tt := range map[string]struct {
		deaf, polite bool
		why          string
	}{
		"silent":     {true, false, "500ms of a SIGKILL: the guest hangs"},
		"all smiles": {false, false, "500ms of a SIGKILL: the guest hangs"},
		"lives":      {false, true, "3s of a SIGKILL: the guest cannot end it"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHostile(t, &hostile{deaf: tt.deaf, polite: tt.polite})
			c := h.newClient(true)
			h.run(c, false)
			within(t, func() {
				for range 3 { // one patience for all
					if err := h.kill(); err != nil && !strings.Contains(err.Error(), "finished") {
						t.Error(err)
					}
				}
				if got := h.exited(""); got != 137 {
					t.Errorf("exit status %d, want 137", got)
				}
				h.output(c)
				h.remove()
			})
			if err := h.sandbox.Err(); err == nil || !strings.Contains(err.Error(), tt.why) {
				t.Errorf("the reason is %v", err)
			}
		})
	}
}

func TestAContainerThatWasNotStartedIsDeletedWhateverTheGuestDoes(t *testing.T) {
	h := newHostile(t, &hostile{deaf: true})
	if err := h.create(nil, false); err != nil {
		t.Fatal(err)
	}
	within(t, h.remove)
}

func TestAnAgentThatNeverAnswersIsADeadline(t *testing.T) {
	h := newHostile(t, &hostile{deaf: true, request: 100 * time.Millisecond})
	h.run(nil, false)
	_, err := h.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGTERM)})
	if err == nil || !strings.Contains(err.Error(), "request_timeout (100ms)") {
		t.Errorf("Kill: %v, want that the deadline is named", err)
	}
}

func TestByteCountsThatAreLiesHoldNothingBack(t *testing.T) {
	for name, tt := range map[string]struct {
		bytes  uint64
		behave func(context.Context, net.Conn)
		want   string
	}{
		"more than was sent": {bytes: math.MaxUint64, behave: func(context.Context, net.Conn) {}},
		"more, and trickles": {bytes: math.MaxUint64, behave: func(ctx context.Context, c net.Conn) {
			for tick := time.NewTicker(10 * time.Millisecond); ; {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				if _, err := c.Write([]byte{'.'}); err != nil {
					return
				}
			}
		}},
		"less than was sent": {bytes: 0, behave: func(_ context.Context, c net.Conn) {
			c.Write([]byte("late")) //nolint:errcheck // the output tells
			c.Close()               //nolint:errcheck // likewise
		}, want: "late"},
	} {
		t.Run(name, func(t *testing.T) {
			g := &hostile{}
			h := newHostile(t, g)
			c := h.newClient(false)
			began := time.Now()
			h.run(c, false)
			ctx, cancel := context.WithCancel(t.Context())
			var guest sync.WaitGroup
			guest.Go(func() { tt.behave(ctx, g.stdout) })
			defer guest.Wait()
			defer cancel()
			within(t, func() {
				g.exits <- &agentv1.WaitProcessResponse{ExitStatus: 3, ExitedAtNs: math.MinInt64, StdoutBytes: tt.bytes}
				if got := h.exited(""); got != 3 {
					t.Errorf("exit status %d, want 3", got)
				}
			})
			st, err := h.State(t.Context(), &taskapi.StateRequest{ID: "c"})
			if err != nil || st.ExitedAt.AsTime().Before(began) {
				t.Errorf("it has exited at %s, before it began: %v", st.ExitedAt.AsTime(), err)
			}
			if tt.want != "" {
				if got := h.output(c); got != tt.want {
					t.Errorf("output %q, want %q", got, tt.want)
				}
			}
			within(t, h.remove)
		})
	}
}

func TestAnExitThatIsNoneIsUnknown(t *testing.T) {
	g := &hostile{}
	h := newHostile(t, g)
	h.run(nil, false)
	g.exits <- &agentv1.WaitProcessResponse{ExitStatus: 1 << 20}
	within(t, func() {
		if got := h.exited(""); got != 255 {
			t.Errorf("exit status %d, want 255", got)
		}
		h.remove()
	})
}

func TestProcessesThatTheGuestInvents(t *testing.T) {
	g := &hostile{list: &agentv1.ListProcessesResponse{Processes: []*agentv1.ProcessInfo{{Pid: 7, ExecId: "invented"}}}}
	h := newHostile(t, g)
	h.run(nil, false)
	r, err := h.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"})
	if err != nil || len(r.Processes) != 1 || r.Processes[0].Info != nil {
		t.Errorf("Pids: %v, %v; want one without an exec's id", r, err)
	}
	g.list = &agentv1.ListProcessesResponse{Processes: slices.Repeat([]*agentv1.ProcessInfo{{Pid: 7}}, 1<<17)}
	if _, err := h.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"}); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("Pids of %d: %v, want one line", len(g.list.Processes), err)
	}
}

func TestAFloodOfEventsIsDammed(t *testing.T) {
	oom := func(id string) *agentv1.Event {
		return &agentv1.Event{Event: &agentv1.Event_Oom{Oom: &agentv1.OOMEvent{ContainerId: id}}}
	}
	begin, done := make(chan struct{}), make(chan error, 1)
	h := newHostile(t, &hostile{events: func(s agentv1.Agent_WatchEventsServer) error {
		<-begin
		var errs []error
		for range 1000 {
			errs = append(errs, s.Send(oom("c")), s.Send(oom("stranger")))
		}
		done <- errors.Join(append(errs, s.Send(&agentv1.Event{}))...)
		return nil
	}})
	h.run(nil, false)
	began := time.Now()
	close(begin)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	h.exited("")
	h.remove()
	h.expectLast("delete")
	most := 1 + int(time.Since(began)/time.Second)
	h.mu.Lock()
	defer h.mu.Unlock()
	told := len(slices.DeleteFunc(slices.Clone(h.told), func(w string) bool { return w != "oom" }))
	if told == 0 || told > most {
		t.Errorf("containerd was told of %d OOMs, want 1 to %d", told, most)
	}
}
