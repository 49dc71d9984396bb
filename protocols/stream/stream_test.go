package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"
)

// limit bounds every wait; only a broken test meets it.
const limit = 30 * time.Second

// carriers are the kinds of connection the handshake is tested over: one that
// keeps what is written, and one on which each Write waits for its Reads.
var carriers = map[string]func(testing.TB) (host, guest net.Conn){
	"socketpair": socketpair,
	"pipe":       func(testing.TB) (host, guest net.Conn) { return net.Pipe() },
}

// over runs a test on both ends of each kind of connection.
func over(t *testing.T, test func(t *testing.T, host, guest net.Conn)) {
	t.Helper()
	for name, connect := range carriers {
		t.Run(name, func(t *testing.T) {
			host, guest := connect(t)
			t.Cleanup(func() { host.Close(); guest.Close() })
			test(t, host, guest)
		})
	}
}

func socketpair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// offer runs Offer, whose result the channel yields.
func offer(ctx context.Context, conn net.Conn, token Token) <-chan error {
	done := make(chan error, 1)
	go func() { done <- Offer(ctx, conn, token) }()
	return done
}

func result(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		t.Fatal("Offer does not return")
		return nil
	}
}

func TestHandshakeThenTheStreamsBytes(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		token := NewToken()
		done := offer(t.Context(), host, token)
		got, err := ReadToken(guest)
		if err != nil || got != token {
			t.Fatalf("ReadToken: %v, %v, want %v", got, err, token)
		}
		if err := Answer(guest, true); err != nil {
			t.Fatalf("Answer: %v", err)
		}
		if err := result(t, done); err != nil {
			t.Fatalf("Offer: %v", err)
		}
		// No byte of the handshake is left, and no deadline of it.
		for _, way := range [][2]net.Conn{{host, guest}, {guest, host}} {
			go io.WriteString(way[0], "bytes")
			b := make([]byte, 5)
			if _, err := io.ReadFull(way[1], b); err != nil || string(b) != "bytes" {
				t.Errorf("after the handshake: %q, %v", b, err)
			}
		}
	})
}

// A host may well send the first bytes of a stream along with the handshake;
// they are the stream's, not the handshake's.
func TestReadTokenReadsNoFurther(t *testing.T) {
	host, guest := socketpair(t)
	defer host.Close()
	defer guest.Close()
	token := NewToken()
	io.WriteString(host, magic+string(token[:])+"input")
	host.Close()
	got, err := ReadToken(guest)
	if err != nil || got != token {
		t.Fatalf("%v, %v, want %v", got, err, token)
	}
	if rest, err := io.ReadAll(guest); string(rest) != "input" || err != nil {
		t.Errorf("left %q, %v", rest, err)
	}
}

func TestOfferRefused(t *testing.T) {
	for _, refuse := range []func(net.Conn) error{
		func(guest net.Conn) error { return Answer(guest, false) },
		func(guest net.Conn) error { _, err := guest.Write([]byte{255}); return err },
	} {
		over(t, func(t *testing.T, host, guest net.Conn) {
			done := offer(t.Context(), host, NewToken())
			if _, err := ReadToken(guest); err != nil {
				t.Fatal(err)
			}
			if err := refuse(guest); err != nil {
				t.Fatal(err)
			}
			if err := result(t, done); !errors.Is(err, ErrHandshake) {
				t.Errorf("Offer: %v, want ErrHandshake", err)
			}
		})
	}
}

func TestOfferToOneThatGoesAway(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := offer(t.Context(), host, NewToken())
		if _, err := ReadToken(guest); err != nil {
			t.Fatal(err)
		}
		guest.Close()
		if err := result(t, done); !errors.Is(err, io.EOF) {
			t.Errorf("Offer: %v, want EOF", err)
		}
	})
}

// Over the pipe the Write is what waits, over the socket the Read.
func TestOfferEndsWithItsContext(t *testing.T) {
	over(t, func(t *testing.T, host, _ net.Conn) {
		why := errors.New("given up")
		ctx, cancel := context.WithCancelCause(t.Context())
		done := offer(ctx, host, NewToken())
		cancel(why)
		if err := result(t, done); !errors.Is(err, why) {
			t.Errorf("Offer: %v, want %v", err, why)
		}
	})
}

func TestReadTokenRefuses(t *testing.T) {
	whole := magic + strings.Repeat("t", TokenLen)
	for name, c := range map[string]struct {
		sent string
		want error
	}{
		"nothing":         {"", io.EOF},
		"half a magic":    {whole[:2], io.ErrUnexpectedEOF},
		"no token":        {magic, io.ErrUnexpectedEOF},
		"most of a token": {whole[:len(whole)-1], io.ErrUnexpectedEOF},
		"another magic":   {"HSK2" + whole[4:], ErrHandshake},
		"another case":    {"hsk1" + whole[4:], ErrHandshake},
		"text":            {"GET / HTTP/1.1\r\n\r\n\r\n", ErrHandshake},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := socketpair(t)
			defer guest.Close()
			io.WriteString(host, c.sent)
			host.Close()
			if token, err := ReadToken(guest); !errors.Is(err, c.want) || token != (Token{}) {
				t.Errorf("%v, %v, want %v", token, err, c.want)
			}
		})
	}
}

func TestParseToken(t *testing.T) {
	token := NewToken()
	if got, err := ParseToken(token[:]); err != nil || got != token {
		t.Errorf("%v, %v, want %v", got, err, token)
	}
	for _, n := range []int{0, TokenLen - 1, TokenLen + 1} {
		if _, err := ParseToken(make([]byte, n)); err == nil {
			t.Errorf("a token of %d bytes was taken", n)
		}
	}
	if a, b := NewToken(), NewToken(); a == b {
		t.Errorf("the same token twice: %x", a)
	}
	if s := token.String(); len(s) != 8 {
		t.Errorf("%q tells more than four bytes of a token", s)
	}
}

// FuzzReadToken feeds what a peer may send, in reads as short as they can be: a
// token comes of the right bytes only, and what follows them is left.
func FuzzReadToken(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte(magic))
	f.Add([]byte(magic + strings.Repeat("t", TokenLen)))
	f.Add([]byte(magic + strings.Repeat("t", TokenLen) + "input"))
	f.Add([]byte("HSK0" + strings.Repeat("t", TokenLen)))
	f.Fuzz(func(t *testing.T, sent []byte) {
		rest := bytes.NewReader(sent)
		token, err := ReadToken(readerConn{Reader: iotest.OneByteReader(rest)})
		proper := len(sent) >= len(magic)+TokenLen && string(sent[:len(magic)]) == magic
		if proper != (err == nil) {
			t.Fatalf("%q: %v", sent, err)
		}
		if proper && (string(token[:]) != string(sent[len(magic):len(magic)+TokenLen]) || rest.Len() != len(sent)-len(magic)-TokenLen) {
			t.Errorf("%q: token %x, %d bytes left", sent, token[:], rest.Len())
		}
	})
}

// FuzzOffer feeds the host's end whatever a guest may answer: only one byte is
// taken, and only 0 is a yes.
func FuzzOffer(f *testing.F) {
	for _, answer := range []string{"", "\x00", "\x01", "\xff", "\x00output"} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		rest := bytes.NewReader(answer)
		err := Offer(t.Context(), readerConn{Reader: rest, Writer: io.Discard}, Token{})
		if yes := len(answer) > 0 && answer[0] == answerOK; yes != (err == nil) {
			t.Errorf("%q: %v", answer, err)
		}
		if len(answer) > 0 && rest.Len() != len(answer)-1 {
			t.Errorf("%q: %d bytes left", answer, rest.Len())
		}
	})
}

// readerConn is a connection to a peer that has said all it says.
type readerConn struct {
	net.Conn // nil
	io.Reader
	io.Writer
}

func (c readerConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c readerConn) Write(b []byte) (int, error)     { return c.Writer.Write(b) }
func (c readerConn) SetDeadline(time.Time) error     { return nil }
func (c readerConn) SetReadDeadline(time.Time) error { return nil }
