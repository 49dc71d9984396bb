package forward

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// flowingUnix joins two ends of a flow whose sides are unix sockets, as those of a
// forwarded socket are.
func flowingUnix(t *testing.T) (client, service *net.UnixConn, done <-chan struct{}) {
	t.Helper()
	host, guest := socketpair(t)
	c, accepted := socketpair(t)
	s, dialled := socketpair(t)
	ended := make(chan struct{}, 2)
	for carrier, conn := range map[net.Conn]net.Conn{guest: accepted, host: dialled} {
		go func() { Copy(context.Background(), carrier, conn); ended <- struct{}{} }()
	}
	both := make(chan struct{})
	go func() { <-ended; <-ended; close(both) }()
	for _, conn := range []net.Conn{c, s} {
		conn.SetDeadline(time.Now().Add(limit))
		t.Cleanup(func() { conn.Close() })
	}
	return c.(*net.UnixConn), s.(*net.UnixConn), both
}

func TestUnixFlowKeepsHalfCloses(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, first := range []string{"client", "service"} {
		client, service, done := flowingUnix(t)
		a, b := client, service
		if first == "service" {
			a, b = b, a
		}
		go func() {
			a.Write(big)
			a.CloseWrite()
		}()
		if got, err := io.ReadAll(b); !bytes.Equal(got, big) || err != nil {
			t.Errorf("%s first: %d bytes, %v", first, len(got), err)
		}
		// The other way is still open.
		go func() {
			b.Write(big)
			b.CloseWrite()
		}()
		if got, err := io.ReadAll(a); !bytes.Equal(got, big) || err != nil {
			t.Errorf("%s first, the way back: %d bytes, %v", first, len(got), err)
		}
		select {
		case <-done:
		case <-time.After(limit):
			t.Errorf("%s first: a flow that has ended both ways is not over", first)
		}
	}
}

// A peer that closes, and has sent all it has, ends the flow: what it sent arrives,
// and then the other is as one whose peer has closed, though it never writes.
func TestUnixFlowEndsWithItsPeer(t *testing.T) {
	for _, gone := range []string{"client", "service"} {
		client, service, done := flowingUnix(t)
		a, b := client, service
		if gone == "service" {
			a, b = b, a
		}
		a.Write([]byte("last words"))
		a.Close()
		select {
		case <-done:
		case <-time.After(limit):
			t.Fatalf("the flow outlives its %s", gone)
		}
		if got, err := io.ReadAll(b); string(got) != "last words" || err != nil {
			t.Errorf("the %s closed: %q, %v", gone, got, err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a write to a %s that has closed: %v, want EPIPE", gone, err)
		}
	}
}

// A reader that stops stops the writer: what is under way is bounded.
func TestUnixFlowHoldsTheWriterBack(t *testing.T) {
	client, service, done := flowingUnix(t)
	const most = 8 << 20
	client.SetWriteDeadline(time.Now().Add(2 * time.Second))
	var sent int
	for b := make([]byte, 64<<10); ; {
		n, err := client.Write(b)
		sent += n
		if err != nil {
			break
		}
		if sent > most {
			t.Fatalf("%d bytes are under way that nobody reads", sent)
		}
	}
	client.Close()
	if n, err := io.Copy(io.Discard, service); n != int64(sent) || err != nil {
		t.Errorf("%d of %d bytes arrive, %v", n, sent, err)
	}
	<-done
}
