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
	"testing"
	"time"
)

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
