package channel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	guestchannel "github.com/husk-containers/husk/agent/channel"
)

// testPort is a port of the guest that the tests listen on.
const testPort = 1025

// A pair is both ends of one carrier.
type pair struct {
	host  Carrier
	guest *guestchannel.Channel
}

// carriers are the implementations under test, each with both its real ends and
// nothing of a VMM between them.
var carriers = []struct {
	name    string
	require func(t *testing.T) // skips where the machine lacks it
	open    func(t *testing.T) pair
}{
	{"virtio-serial", func(*testing.T) {}, openSerialPair},
	{"vhost-vsock", requireVsock, openVsockPair},
}

func openSerialPair(t *testing.T) pair {
	t.Helper()
	host, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	ports := make(chan io.ReadWriteCloser, 1)
	ports <- guestEnd(t, host)
	return pair{host, guestchannel.NewSerial(func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case p := <-ports:
			return p, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	})}
}

// guestEnd takes the VMM's file, as the VMM does.
func guestEnd(t *testing.T, s *Serial) net.Conn {
	t.Helper()
	conn, err := net.FileConn(s.GuestFile())
	if err != nil {
		t.Fatal(err)
	}
	s.GuestFile().Close()
	return conn
}

func requireVsock(t *testing.T) {
	t.Helper()
	l, err := vsock.ListenContextID(vsock.Local, 0, nil)
	if err != nil {
		t.Skipf("no vsock loopback (modprobe vsock_loopback): %v", err)
	}
	l.Close()
}

// openVsockPair uses the kernel's loopback: host and guest are CID 1.
func openVsockPair(t *testing.T) pair {
	t.Helper()
	host, err := newVsock(nil, vsock.Local, vsock.Local)
	if err != nil {
		t.Fatal(err)
	}
	return pair{host, guestchannel.NewVsock(vsock.Local, host.port())}
}

// connect makes the control connection and leaves an echo server on testPort.
func connect(t *testing.T, p pair, serve func(net.Conn)) (host, guest net.Conn) {
	t.Helper()
	ctx := testContext(t)
	l, err := p.guest.Listen(testPort)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	guest, err = p.guest.DialControl(ctx)
	if err != nil {
		t.Fatal(err)
	}
	host, err = p.host.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		guest.Close()
		host.Close()
		p.guest.Close()
		p.host.Close()
		wg.Wait()
	})
	return host, guest
}

func echo(conn net.Conn) {
	io.Copy(conn, conn)
	closeWrite(conn)
}

func closeWrite(conn net.Conn) error {
	return conn.(interface{ CloseWrite() error }).CloseWrite()
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// dial connects to testPort with a deadline for everything on it.
func dial(t *testing.T, p pair) net.Conn {
	t.Helper()
	conn, err := p.host.Dial(testContext(t), testPort)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

// roundTrip sends msg, half-closes, and wants it back before EOF.
func roundTrip(conn net.Conn, msg []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(msg)
		sent <- errors.Join(err, closeWrite(conn))
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if !bytes.Equal(got, msg) {
		return fmt.Errorf("sent %d bytes, %d other ones came back", len(msg), len(got))
	}
	return nil
}

func TestConformance(t *testing.T) {
	cases := []struct {
		name string
		run  func(t *testing.T, p pair)
	}{
		{"control connection both ways", testControl},
		{"dial waits for the guest", testDialWaits},
		{"context ends Dial and Accept", testContextEnds},
		{"ports are apart", testPorts},
		{"port without a listener", testRefused},
		{"half-close either way", testHalfClose},
		{"slow reader blocks only itself", testBackPressure},
		{"1000 connections one after the other", testSequential},
		{"1000 connections at once", testConcurrent},
		{"20 MiB both ways", testBulk},
		{"close with unread data", testCloseUnread},
		{"deadlines", testDeadlines},
		{"guest reconnects its control connection", testReconnectControl},
		{"close of the host ends everything", testHostClose},
	}
	for _, carrier := range carriers {
		t.Run(carrier.name, func(t *testing.T) {
			carrier.require(t)
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					before := runtime.NumGoroutine()
					t.Cleanup(func() { wantGoroutines(t, before) })
					c.run(t, carrier.open(t))
				})
			}
		})
	}
}

// wantGoroutines fails if goroutines of this module outlive the test.
func wantGoroutines(t *testing.T, want int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > want {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Errorf("goroutines left: %d, were %d\n%s", runtime.NumGoroutine(), want, buf[:runtime.Stack(buf, true)])
			return
		}
		runtime.Gosched()
	}
}

func testControl(t *testing.T, p pair) {
	host, guest := connect(t, p, echo)
	for _, end := range [][2]net.Conn{{host, guest}, {guest, host}} {
		if _, err := io.WriteString(end[0], "hello"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(end[1], got); err != nil || string(got) != "hello" {
			t.Fatalf("read %q, %v", got, err)
		}
	}
}

func testDialWaits(t *testing.T, p pair) {
	dialed := make(chan error, 1)
	go func() {
		conn, err := p.host.Dial(testContext(t), testPort)
		if err == nil {
			err = roundTrip(conn, []byte("x"))
			conn.Close()
		}
		dialed <- err
	}()
	select {
	case err := <-dialed:
		t.Fatalf("dialed a guest that is not there: %v", err)
	case <-time.After(20 * time.Millisecond): // it has had its chance to be wrong
	}
	connect(t, p, echo)
	if err := <-dialed; err != nil {
		t.Fatal(err)
	}
}

func testContextEnds(t *testing.T, p pair) {
	defer p.host.Close()
	defer p.guest.Close()
	why := errors.New("given up")
	ctx, cancel := context.WithCancelCause(context.Background())
	errs := make(chan error, 2)
	go func() {
		_, err := p.host.Dial(ctx, testPort)
		errs <- err
	}()
	go func() {
		_, err := p.host.Accept(ctx)
		errs <- err
	}()
	cancel(why)
	for range 2 {
		if err := <-errs; !errors.Is(err, why) {
			t.Errorf("got %v, want the cause of the context's end", err)
		}
	}
}

func testPorts(t *testing.T, p pair) {
	connect(t, p, func(conn net.Conn) { io.WriteString(conn, "first") })
	l, err := p.guest.Listen(testPort + 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.guest.Listen(testPort + 1); err == nil {
		t.Error("listened twice on one port")
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			io.WriteString(conn, "second")
			conn.Close()
		}
	}()
	for i, want := range []string{"first", "second"} {
		conn, err := p.host.Dial(testContext(t), uint32(testPort+i))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != want {
			t.Errorf("port %d: read %q, %v; want %q", testPort+i, got, err, want)
		}
		conn.Close()
	}
}

func testRefused(t *testing.T, p pair) {
	connect(t, p, echo)
	conn, err := p.host.Dial(testContext(t), 9)
	if err != nil {
		return // vsock says so at once
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d, %v; want the end", n, err)
	}
}

func testHalfClose(t *testing.T, p pair) {
	const question, answer = "question", "answer"
	heard := make(chan string, 2)
	connect(t, p, func(conn net.Conn) {
		// The guest closes its half first, and still hears the host.
		io.WriteString(conn, answer)
		closeWrite(conn)
		b, _ := io.ReadAll(conn)
		heard <- string(b)
	})
	conn := dial(t, p)
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != answer {
		t.Fatalf("read %q, %v", got, err)
	}
	if _, err := io.WriteString(conn, question); err != nil {
		t.Fatalf("write after the peer's half-close: %v", err)
	}
	if err := closeWrite(conn); err != nil {
		t.Fatal(err)
	}
	if got := <-heard; got != question {
		t.Errorf("guest heard %q", got)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("wrote after CloseWrite")
	}
	// The other order is that of echo: roundTrip half-closes first.
}

func testSequential(t *testing.T, p pair) {
	connect(t, p, echo)
	for i := range 1000 {
		conn := dial(t, p)
		if err := roundTrip(conn, fmt.Appendf(nil, "connection %d", i)); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		conn.Close()
	}
}

func testConcurrent(t *testing.T, p pair) {
	connect(t, p, echo)
	const n = 1000
	conns := make([]net.Conn, n)
	errs := make(chan error, n)
	for i := range n {
		go func() {
			conn, err := p.host.Dial(testContext(t), testPort)
			conns[i] = conn
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for i, conn := range conns { // all are open now
		go func() {
			conn.SetDeadline(time.Now().Add(time.Minute))
			errs <- roundTrip(conn, fmt.Appendf(nil, "connection %d", i))
			conn.Close()
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func testBulk(t *testing.T, p pair) {
	const size = 20 << 20
	connect(t, p, echo)
	conn := dial(t, p)
	defer conn.Close()
	seed := [32]byte{1}
	want := sha256.New()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, io.TeeReader(io.LimitReader(rand.NewChaCha8(seed), size), want))
		sent <- errors.Join(err, closeWrite(conn))
	}()
	got := sha256.New()
	n, err := io.Copy(got, conn)
	if err := errors.Join(err, <-sent); err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("checksums differ")
	}
}

func testBackPressure(t *testing.T, p pair) {
	const enough = 64 << 20
	connect(t, p, func(conn net.Conn) {
		var first [1]byte
		if io.ReadFull(conn, first[:]); first[0] != 's' {
			conn.Write(first[:])
			echo(conn)
			return
		}
		// The guest floods a reader that does not read.
		n, err := io.Copy(conn, io.LimitReader(zeros{}, enough))
		if n == enough {
			t.Errorf("%d bytes written to a reader that reads none: %v", n, err)
		}
	})
	conn := dial(t, p)
	if _, err := conn.Write([]byte("s")); err != nil {
		t.Fatal(err)
	}
	// Meanwhile 8 MiB pass beside it, which is more than any window.
	for range 8 {
		other := dial(t, p)
		if err := roundTrip(other, bytes.Repeat([]byte("f"), 1<<20)); err != nil {
			t.Fatal(err)
		}
		other.Close()
	}
	conn.Close() // and the flood ends, in the carrier's way
	p.host.Close()
	p.guest.Close()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func testCloseUnread(t *testing.T, p pair) {
	const size = 8 << 20
	wrote := make(chan struct{})
	connect(t, p, func(conn net.Conn) {
		defer close(wrote)
		conn.Write(make([]byte, size)) // it fails or is dropped, and does not block
	})
	conn := dial(t, p)
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	select {
	case <-wrote:
	case <-testContext(t).Done():
		t.Fatal("peer's write is blocked by a reader that has closed")
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if _, err := conn.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

func testDeadlines(t *testing.T, p pair) {
	release := make(chan struct{})
	connect(t, p, func(net.Conn) { <-release }) // neither reads nor writes
	defer close(release)
	conn := dial(t, p)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read: %v", err)
	}
	if _, err := conn.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write: %v", err)
	}
	// Close interrupts what waits.
	conn.SetDeadline(time.Time{})
	errs := make(chan error, 1)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		errs <- err
	}()
	conn.Close()
	if err := <-errs; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read during Close: %v", err)
	}
}

func testReconnectControl(t *testing.T, p pair) {
	host, guest := connect(t, p, echo)
	host.Close()
	if _, err := guest.Read(make([]byte, 1)); err == nil {
		t.Fatal("read from a closed peer")
	}
	again, err := p.guest.DialControl(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	host, err = p.host.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go echo(host)
	if err := roundTrip(again, []byte("again")); err != nil {
		t.Fatal(err)
	}
}

func testHostClose(t *testing.T, p pair) {
	connect(t, p, echo)
	accepted := make(chan error, 1)
	go func() {
		_, err := p.host.Accept(context.Background())
		accepted <- err
	}()
	p.host.Close()
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	if _, err := p.host.Dial(context.Background(), testPort); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Dial: %v", err)
	}
	if err := p.host.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
