package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/husk-containers/husk/protocols/forward"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// A guest serves flows on a socket of this machine.
type guest struct {
	*testing.T
	path string
	end  context.CancelFunc
	done chan error
	ln   net.Listener

	mu       sync.Mutex
	accepted map[uint64]net.Conn // that wait
}

// claim implements Claim.
func (g *guest) claim(number uint64) (net.Conn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	conn := g.accepted[number]
	if conn == nil {
		return nil, syscall.ENOENT
	}
	delete(g.accepted, number)
	return conn, nil
}

// accept has a connection of a process in the guest wait, and returns its end.
func (g *guest) accept(number uint64) *net.UnixConn {
	g.Helper()
	path := filepath.Join(g.TempDir(), "socket")
	ln, err := net.Listen("unix", path)
	if err != nil {
		g.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("unix", path)
	if err != nil {
		g.Fatal(err)
	}
	conn, err := ln.Accept()
	if err != nil {
		g.Fatal(err)
	}
	client.SetDeadline(time.Now().Add(limit))
	g.Cleanup(func() { client.Close(); conn.Close() })
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.accepted == nil {
		g.accepted = map[uint64]net.Conn{}
	}
	g.accepted[number] = conn
	return client.(*net.UnixConn)
}

func newGuest(t *testing.T, flows int) *guest {
	t.Helper()
	g := &guest{T: t, path: filepath.Join(t.TempDir(), "channel"), done: make(chan error, 1)}
	var err error
	if g.ln, err = net.Listen("unix", g.path); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	g.end = cancel
	go func() { g.done <- newServer(g.claim, flows, flows).serve(ctx, g.ln) }()
	t.Cleanup(func() {
		cancel()
		if err := g.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return g
}

// result returns what Serve has, and leaves it for the clean-up.
func (g *guest) result() error {
	g.Helper()
	select {
	case err := <-g.done:
		g.done <- err
		return err
	case <-time.After(limit):
		g.Fatal("Serve does not return")
		return nil
	}
}

// dial opens a connection to the guest.
func (g *guest) dial() *net.UnixConn {
	g.Helper()
	conn, err := net.Dial("unix", g.path)
	if err != nil {
		g.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(limit))
	g.Cleanup(func() { conn.Close() })
	return conn.(*net.UnixConn)
}

func (g *guest) open(target forward.Target) (*net.UnixConn, error) {
	g.Helper()
	conn := g.dial()
	return conn, forward.Request(g.Context(), conn, target)
}

// serviceAt answers each TCP connection with its own address and what it was sent.
func serviceAt(t *testing.T, addr string) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("listen on %s: %v", addr, err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				b, _ := io.ReadAll(conn)
				fmt.Fprintf(conn, "%s %s", conn.LocalAddr().(*net.TCPAddr).IP, b)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		serving.Wait()
	})
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// say sends text, half-closes, and returns what comes back until the half-close.
func say(conn net.Conn, text string) (string, error) {
	frame, err := forward.AppendFrame(nil, []byte(text))
	if err != nil {
		return "", err
	}
	if _, err := conn.Write(append(frame, 0, 0)); err != nil {
		return "", err
	}
	var all strings.Builder
	for frames := forward.NewFrameReader(conn); ; {
		b, err := frames.Next()
		if err != nil || len(b) == 0 {
			return all.String(), err
		}
		all.Write(b)
	}
}

func TestConnects(t *testing.T) {
	g := newGuest(t, maxFlows)
	v4, v6 := serviceAt(t, "127.0.0.1:0"), serviceAt(t, "[::1]:0")
	alias := serviceAt(t, "127.0.0.2:0")
	for _, c := range []struct {
		addr netip.Addr
		port uint16
		want string
	}{
		{netip.Addr{}, v4, "127.0.0.1 hello"},
		{netip.Addr{}, v6, "::1 hello"}, // 127.0.0.1 refuses
		{netip.IPv6Loopback(), v6, "::1 hello"},
		{netip.MustParseAddr("127.0.0.2"), alias, "127.0.0.2 hello"},
	} {
		target := forward.Target{Network: forward.TCP, Addr: c.addr, Port: c.port}
		conn, err := g.open(target)
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if got, err := say(conn, "hello"); got != c.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", target, got, err, c.want)
		}
	}
	for _, target := range []forward.Target{
		{Network: forward.TCP, Port: alias},
		{Network: forward.TCP, Addr: netip.MustParseAddr("127.0.0.3"), Port: v4},
	} {
		if _, err := g.open(target); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want refused", target, err)
		}
	}
}

func TestDatagrams(t *testing.T) {
	g := newGuest(t, maxFlows)
	service, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := service.ReadFrom(b)
			if err != nil {
				return
			}
			service.WriteTo(b[:n], from)
		}
	}()
	conn, err := g.open(forward.Target{Network: forward.UDP, Port: uint16(service.LocalAddr().(*net.UDPAddr).Port)})
	if err != nil {
		t.Fatal(err)
	}
	frames := forward.NewFrameReader(conn)
	// One that is too large for UDP is lost; an empty one is none the less one.
	for _, size := range []int{1, 0, 65507, 65508, 65535, 3} {
		frame, err := forward.AppendFrame(nil, make([]byte, size))
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(frame)
		if size > 65507 {
			continue
		}
		if got, err := frames.Next(); len(got) != size || err != nil {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}

	// Where nobody listens datagrams are lost, and the flow is not.
	nobody, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := nobody.LocalAddr().(*net.UDPAddr).Port
	nobody.Close()
	if conn, err = g.open(forward.Target{Network: forward.UDP, Port: uint16(port)}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		conn.Write([]byte{0, 1, 'x'})
	}
	if nobody, err = net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
		t.Skipf("the port was taken meanwhile: %v", err)
	}
	defer nobody.Close()
	nobody.SetDeadline(time.Now().Add(limit))
	conn.Write([]byte{0, 1, 'y'})
	for b := make([]byte, 2); b[0] != 'y'; {
		if _, _, err := nobody.ReadFrom(b); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTooManyFlows(t *testing.T) {
	g := newGuest(t, 3)
	target := forward.Target{Network: forward.TCP, Port: serviceAt(t, "127.0.0.1:0")}
	var conns []net.Conn
	for range 3 {
		conn, err := g.open(target)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	if _, err := g.open(target); !errors.Is(err, syscall.ENFILE) {
		t.Errorf("one too many: %v", err)
	}
	conns[0].Close()
	// The slot is free when the flow has ended, which takes its time.
	for deadline := time.Now().Add(limit); ; {
		conn, err := g.open(target)
		if err == nil {
			if got, err := say(conn, "x"); got != "127.0.0.1 x" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			return
		}
		if !errors.Is(err, syscall.ENFILE) || time.Now().After(deadline) {
			t.Fatalf("after one has ended: %v", err)
		}
	}
}

func TestGarbage(t *testing.T) {
	g := newGuest(t, maxFlows)
	for _, sent := range []string{"", "HSK1", "GET / HTTP/1.1\r\n\r\n", "HSKF\x01\x00\x00\x00"} {
		conn := g.dial()
		io.WriteString(conn, sent)
		conn.CloseWrite()
		if b, err := io.ReadAll(conn); len(b) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q is answered %q, %v", sent, b, err)
		}
	}
}

func TestServeEnds(t *testing.T) {
	g := newGuest(t, maxFlows)
	port := serviceAt(t, "127.0.0.1:0")
	silent := g.dial()
	tcp, err := g.open(forward.Target{Network: forward.TCP, Port: port})
	if err != nil {
		t.Fatal(err)
	}
	udp, err := g.open(forward.Target{Network: forward.UDP, Port: port})
	if err != nil {
		t.Fatal(err)
	}
	g.end()
	if err := g.result(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	for _, conn := range []net.Conn{silent, tcp, udp} {
		if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a connection is left: %v", err)
		}
	}
}

func TestServeWithoutItsListener(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "channel"))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := Serve(t.Context(), ln, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

func TestTenThousandFlowsLeaveNothing(t *testing.T) {
	g := newGuest(t, maxFlows)
	port := serviceAt(t, "127.0.0.1:0")
	target := forward.Target{Network: forward.TCP, Port: port}
	refused := forward.Target{Network: forward.TCP, Addr: netip.MustParseAddr("127.0.0.9"), Port: port}
	count := func() (goroutines, fds int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return runtime.NumGoroutine(), len(entries)
	}
	one := func(i int) error {
		conn, err := net.Dial("unix", g.path)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(limit))
		switch i % 10 {
		case 0: // says nothing
			return nil
		case 1: // goes away at once
			_, err := conn.Write([]byte("HSKF\x01\x00"))
			return err
		case 2:
			if err := forward.Request(t.Context(), conn, refused); !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("refused: %w", err)
			}
			return nil
		case 3: // abandons the flow
			return forward.Request(t.Context(), conn, target)
		}
		if err := forward.Request(t.Context(), conn, target); err != nil {
			return err
		}
		if got, err := say(conn, "x"); got != "127.0.0.1 x" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return nil
	}
	for i := range 10 {
		if err := one(i); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond) // the first flows end: what is counted now may be too much, not too little
	goroutines, fds := count()
	numbers := make(chan int)
	var workers sync.WaitGroup
	for range 20 {
		workers.Go(func() {
			for i := range numbers {
				if err := one(i); err != nil {
					t.Errorf("flow %d: %v", i, err)
				}
			}
		})
	}
	for i := range 10000 {
		numbers <- i
	}
	close(numbers)
	workers.Wait()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		g, f := count()
		if g <= goroutines && f <= fds {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines and %d descriptors, %d and %d before", g, f, goroutines, fds)
		}
	}
}

func TestAcceptedConnections(t *testing.T) {
	g := newGuest(t, 2)
	target := forward.Target{Network: forward.Accepted, Connection: 7}
	if _, err := g.open(target); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a number that nothing waits under: %v", err)
	}
	client := g.accept(7)
	conn, err := g.open(target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.open(target); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("claimed twice: %v", err)
	}
	go func() {
		io.WriteString(client, "question")
		client.CloseWrite()
	}()
	if got, err := say(conn, "answer"); got != "question" || err != nil {
		t.Errorf("the host reads %q, %v", got, err)
	}
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Errorf("the client reads %q, %v", got, err)
	}

	// A refused one is closed at once.
	client = g.accept(8)
	if _, err := g.open(forward.Target{Network: forward.Accepted, Connection: 8, Refusal: syscall.ECONNREFUSED}); err != nil {
		t.Errorf("refuse: %v", err)
	}
	if got, err := io.ReadAll(client); len(got) > 0 || err != nil {
		t.Errorf("a client that was refused reads %q, %v", got, err)
	}
}

// Network flows leave room for connections, and the other way round.
func TestKindsHaveSlotsOfTheirOwn(t *testing.T) {
	g := newGuest(t, 1)
	web := forward.Target{Network: forward.TCP, Port: serviceAt(t, "127.0.0.1:0")}
	if _, err := g.open(web); err != nil {
		t.Fatal(err)
	}
	if _, err := g.open(web); !errors.Is(err, syscall.ENFILE) {
		t.Errorf("one flow too many: %v", err)
	}
	g.accept(1)
	if _, err := g.open(forward.Target{Network: forward.Accepted, Connection: 1}); err != nil {
		t.Errorf("a connection beside the flows: %v", err)
	}
	g.accept(2)
	if _, err := g.open(forward.Target{Network: forward.Accepted, Connection: 2}); !errors.Is(err, syscall.ENFILE) {
		t.Errorf("one connection too many: %v", err)
	}
}
