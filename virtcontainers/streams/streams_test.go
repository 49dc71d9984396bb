package streams

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/husk-containers/husk/protocols/stream"
)

// A sink is written to as fast as it is let.
type sink struct {
	mu     sync.Mutex
	got    bytes.Buffer
	gate   chan struct{} // nil: open
	once   sync.Once
	closed chan struct{}
}

func newSink(gate chan struct{}) *sink { return &sink{gate: gate, closed: make(chan struct{})} }

func (s *sink) Write(p []byte) (int, error) {
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-s.closed:
			return 0, io.ErrClosedPipe
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got.Write(p)
}

func (s *sink) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got.String()
}

// connect returns a set and the guest's ends of its streams, in the order of the
// tokens named.
func connect(t *testing.T, stdio Stdio) (set *Set, stdin, stdout, stderr net.Conn) {
	t.Helper()
	var mu sync.Mutex
	guest := map[string]net.Conn{}
	dial := func(_ context.Context, port uint32) (net.Conn, error) {
		if port != stream.Port {
			t.Errorf("dialled port %d", port)
		}
		host, end := net.Pipe()
		go func() {
			token, err := stream.ReadToken(end)
			if err != nil {
				return
			}
			mu.Lock()
			guest[string(token[:])] = end
			mu.Unlock()
			stream.Answer(end, true) //nolint:errcheck // the host tells
		}()
		return host, nil
	}
	set, names, err := Connect(t.Context(), dial, stdio)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(set.Close)
	mu.Lock()
	defer mu.Unlock()
	return set, guest[string(names.Stdin)], guest[string(names.Stdout)], guest[string(names.Stderr)]
}

func TestEachStreamHasItsConnection(t *testing.T) {
	in, inW := io.Pipe()
	out, errs := newSink(nil), newSink(nil)
	set, stdin, stdout, stderr := connect(t, Stdio{Stdin: in, Stdout: out, Stderr: errs})
	for conn, text := range map[net.Conn]string{stdout: "out", stderr: "err"} {
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
	}
	set.Deliver(3, 3, time.Minute)
	if out.String() != "out" || errs.String() != "err" {
		t.Errorf("stdout %q, stderr %q", out, errs)
	}
	go io.WriteString(inW, "in") //nolint:errcheck // the other end tells
	buf := make([]byte, 2)
	if _, err := io.ReadFull(stdin, buf); err != nil || string(buf) != "in" {
		t.Errorf("stdin %q, %v", buf, err)
	}
	set.StopStdin()
	if _, err := inW.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("stdin is still read: %v", err)
	}
}

func TestDeliverWaits(t *testing.T) {
	const long, short = time.Minute, 50 * time.Millisecond
	for name, tt := range map[string]struct {
		closed   bool // the client reads nothing
		says     uint64
		guest    func(net.Conn)
		patience time.Duration
		want     string
	}{
		"for all":                    {says: 4, guest: func(c net.Conn) { io.WriteString(c, "ab"); io.WriteString(c, "cd") }, patience: long, want: "abcd"}, //nolint:errcheck // the output tells
		"not past the end":           {says: 9, guest: func(c net.Conn) { io.WriteString(c, "ab"); c.Close() }, patience: long, want: "ab"},                 //nolint:errcheck // likewise
		"not for a client that left": {closed: true, says: 2, guest: func(c net.Conn) { io.WriteString(c, "ab") }, patience: short},                         //nolint:errcheck // likewise
		"not for bytes never sent":   {says: 9, guest: func(net.Conn) {}, patience: short},
		"not for what trickles in": {says: 1 << 40, patience: short, guest: func(c net.Conn) {
			for tick := time.NewTicker(short / 10); ; <-tick.C {
				if _, err := c.Write([]byte("x")); err != nil {
					return
				}
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var gate chan struct{}
			if tt.closed {
				gate = make(chan struct{})
			}
			out := newSink(gate)
			set, _, stdout, _ := connect(t, Stdio{Stdout: out})
			var guest sync.WaitGroup
			guest.Go(func() { tt.guest(stdout) })
			began := time.Now()
			set.Deliver(tt.says, 0, tt.patience)
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it waited %s", took)
			}
			if tt.want != "" && out.String() != tt.want {
				t.Errorf("delivered %q, want %q", out, tt.want)
			}
			set.Close()
			guest.Wait()
		})
	}
}

// Output that a slow client takes bit by bit is waited for, however long it takes.
func TestDeliverIsPatientWithWhoReads(t *testing.T) {
	const chunks, patience = 10, 100 * time.Millisecond
	out := newSink(make(chan struct{}))
	set, _, stdout, _ := connect(t, Stdio{Stdout: out})
	var others sync.WaitGroup
	others.Go(func() {
		for range chunks {
			stdout.Write([]byte("x")) //nolint:errcheck // the output tells
		}
	})
	others.Go(func() {
		tick := time.NewTicker(patience / 3)
		defer tick.Stop()
		for range chunks {
			<-tick.C
			out.gate <- struct{}{}
		}
	})
	set.Deliver(chunks, 0, patience)
	others.Wait()
	if got := len(out.String()); got != chunks {
		t.Errorf("%d bytes delivered, want %d", got, chunks)
	}
}

func TestConnectIsAllOrNothing(t *testing.T) {
	refused := errors.New("refused")
	var open sync.WaitGroup
	dials := make(chan int, 2)
	dials <- 0
	dials <- 1
	out := newSink(nil)
	_, _, err := Connect(t.Context(), func(context.Context, uint32) (net.Conn, error) {
		if <-dials == 1 {
			return nil, refused
		}
		host, end := net.Pipe()
		open.Go(func() { io.Copy(io.Discard, end) }) //nolint:errcheck // until the host's end is closed
		return host, nil
	}, Stdio{Stdout: out, Stderr: newSink(nil)})
	if !errors.Is(err, refused) {
		t.Errorf("Connect: %v", err)
	}
	open.Wait()
	select {
	case <-out.closed:
		t.Error("the client's end was closed")
	default:
	}
	var none *Set
	none.StopStdin()
	none.Deliver(1, 1, time.Minute)
	none.Close()
}
