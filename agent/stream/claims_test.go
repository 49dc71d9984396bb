package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/protocols/stream"
)

// newClaims returns claims that serve, and a way to connect to them.
func newClaims(t *testing.T, timeout time.Duration) (*Claims, func() net.Conn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "streams"))
	if err != nil {
		t.Fatal(err)
	}
	c := NewClaims(ln)
	c.timeout = timeout
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- c.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c, func() net.Conn {
		conn, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
}

func TestClaimOnce(t *testing.T) {
	c, dial := newClaims(t, time.Minute)
	conn, token := dial(), stream.NewToken()
	if err := stream.Offer(t.Context(), conn, token); err != nil {
		t.Fatal(err)
	}
	if err := stream.Offer(t.Context(), dial(), token); !errors.Is(err, stream.ErrHandshake) {
		t.Errorf("second offer of one token: %v", err)
	}
	guest, err := c.Claim(token[:])
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	if _, err := c.Claim(token[:]); !errdefs.IsNotFound(err) {
		t.Errorf("second claim: %v", err)
	}
	io.WriteString(conn, "hello")
	b := make([]byte, 5)
	if _, err := io.ReadFull(guest, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestClaimBadTokens(t *testing.T) {
	c, _ := newClaims(t, time.Minute)
	if conn, err := c.Claim(nil); conn != nil || err != nil {
		t.Errorf("empty token: %v, %v", conn, err)
	}
	if _, err := c.Claim([]byte("short")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("short token: %v", err)
	}
}

func TestClaimAllOrNone(t *testing.T) {
	c, dial := newClaims(t, time.Minute)
	conn, token, other := dial(), stream.NewToken(), stream.NewToken()
	if err := stream.Offer(t.Context(), conn, token); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ClaimAll(token[:], other[:], nil); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the claimed connection is not closed: %v", err)
	}
}

func TestUnclaimedIsDropped(t *testing.T) {
	c, dial := newClaims(t, time.Millisecond)
	conn, token := dial(), stream.NewToken()
	if err := stream.Offer(t.Context(), conn, token); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("not closed: %v", err)
	}
	if _, err := c.Claim(token[:]); !errdefs.IsNotFound(err) {
		t.Errorf("claimed: %v", err)
	}
}

func TestGarbageIsDropped(t *testing.T) {
	_, dial := newClaims(t, time.Minute)
	conn := dial()
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: example\r\n\r\n")
	if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, net.ErrClosed) && !isReset(err) {
		t.Error(err)
	}
}

func TestTooManyUnclaimed(t *testing.T) {
	c, dial := newClaims(t, time.Minute)
	var last stream.Token
	for range maxUnclaimed {
		last = stream.NewToken()
		if err := stream.Offer(t.Context(), dial(), last); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Offer(t.Context(), dial(), stream.NewToken()); err == nil {
		t.Error("one more than the limit is kept")
	}
	conn, err := c.Claim(last[:])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := stream.Offer(t.Context(), dial(), stream.NewToken()); err != nil {
		t.Errorf("a claim does not make room: %v", err)
	}
}
