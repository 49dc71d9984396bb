package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
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

// request runs Request, whose result the channel yields.
func request(ctx context.Context, conn net.Conn, t Target) <-chan error {
	done := make(chan error, 1)
	go func() { done <- Request(ctx, conn, t) }()
	return done
}

func result(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		t.Fatal("Request does not return")
		return nil
	}
}

var (
	loopbackWeb = Target{Network: TCP, Port: 80}
	targets     = []Target{
		loopbackWeb,
		{Network: UDP, Port: 65535},
		{Network: TCP, Addr: netip.MustParseAddr("127.0.0.2"), Port: 1},
		{Network: UDP, Addr: netip.MustParseAddr("2001:db8::1"), Port: 53},
		{Network: Accepted, Connection: 1<<64 - 1},
		{Network: Accepted, Connection: 1, Refusal: syscall.ECONNREFUSED},
	}
)

func TestHandshakeThenTheFlow(t *testing.T) {
	for _, target := range targets {
		over(t, func(t *testing.T, host, guest net.Conn) {
			done := request(t.Context(), host, target)
			if got, err := ReadRequest(guest); err != nil || got != target {
				t.Fatalf("ReadRequest: %v, %v, want %v", got, err, target)
			}
			if err := Answer(guest, nil); err != nil {
				t.Fatalf("Answer: %v", err)
			}
			if err := result(t, done); err != nil {
				t.Fatalf("Request: %v", err)
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
}

func TestConnectErrorsCross(t *testing.T) {
	for _, c := range []struct {
		answer error
		want   syscall.Errno
	}{
		{syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}, syscall.ENETUNREACH},
		{errors.New("no errno"), syscall.EIO},
		{syscall.Errno(0), syscall.EIO},
		{syscall.Errno(512), syscall.EIO},
	} {
		over(t, func(t *testing.T, host, guest net.Conn) {
			done := request(t.Context(), host, loopbackWeb)
			if _, err := ReadRequest(guest); err != nil {
				t.Fatal(err)
			}
			if err := Answer(guest, c.answer); err != nil {
				t.Fatal(err)
			}
			err := result(t, done)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), "tcp loopback:80") {
				t.Errorf("%v: %v", c.answer, err)
			}
		})
	}
}

func TestRequestToOneThatGoesAway(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := request(t.Context(), host, loopbackWeb)
		if _, err := ReadRequest(guest); err != nil {
			t.Fatal(err)
		}
		guest.Close()
		if err := result(t, done); !errors.Is(err, io.EOF) {
			t.Errorf("Request: %v, want EOF", err)
		}
	})
}

// Over the pipe the Write is what waits, over the socket the Read.
func TestRequestEndsWithItsContext(t *testing.T) {
	over(t, func(t *testing.T, host, _ net.Conn) {
		why := errors.New("given up")
		ctx, cancel := context.WithCancelCause(t.Context())
		done := request(ctx, host, loopbackWeb)
		cancel(why)
		if err := result(t, done); !errors.Is(err, why) {
			t.Errorf("Request: %v, want %v", err, why)
		}
	})
}

func TestValidate(t *testing.T) {
	for _, target := range targets {
		if err := target.Validate(); err != nil {
			t.Error(err)
		}
	}
	addr := netip.MustParseAddr
	for _, target := range []Target{
		{},
		{Network: TCP},
		{Port: 80},
		{Network: 4, Port: 80},
		{Network: TCP, Port: 80, Connection: 1},
		{Network: TCP, Port: 80, Refusal: syscall.EIO},
		{Network: Accepted},
		{Network: Accepted, Connection: 1, Port: 80},
		{Network: Accepted, Connection: 1, Addr: addr("127.0.0.1")},
		{Network: Accepted, Connection: 1, Refusal: 1 << 16},
		{Network: TCP, Addr: addr("0.0.0.0"), Port: 80},
		{Network: TCP, Addr: addr("::"), Port: 80},
		{Network: UDP, Addr: addr("224.0.0.1"), Port: 80},
		{Network: UDP, Addr: addr("ff02::1"), Port: 80},
		{Network: UDP, Addr: addr("255.255.255.255"), Port: 80},
		{Network: TCP, Addr: addr("::ffff:127.0.0.1"), Port: 80},
		{Network: TCP, Addr: addr("fe80::1%lo"), Port: 80},
	} {
		if target.Validate() == nil {
			t.Errorf("%s is valid", target)
		}
		host, guest := net.Pipe()
		if err := Request(t.Context(), host, target); err == nil {
			t.Errorf("%s was asked for", target)
		}
		host.Close()
		guest.Close()
	}
}

func TestReadRequestRefuses(t *testing.T) {
	const whole = "HSKF\x01\x04\x7f\x00\x00\x01\x00\x50"
	for name, c := range map[string]struct {
		sent string
		want error
	}{
		"nothing":            {"", io.EOF},
		"half a magic":       {whole[:2], io.ErrUnexpectedEOF},
		"no address":         {whole[:6], io.ErrUnexpectedEOF},
		"half a port":        {whole[:len(whole)-1], io.ErrUnexpectedEOF},
		"another magic":      {"HSK1" + whole[4:], ErrHandshake},
		"text":               {"GET / HTTP/1.1\r\n\r\n\r\n", ErrHandshake},
		"network 0":          {"HSKF\x00" + whole[5:], ErrHandshake},
		"network 4":          {"HSKF\x04" + whole[5:], ErrHandshake},
		"a number of 4":      {"HSKF\x03" + whole[5:], ErrHandshake},
		"TCP to a number":    {"HSKF\x01\x08\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00", ErrHandshake},
		"number 0":           {"HSKF\x03\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", ErrHandshake},
		"half a number":      {"HSKF\x03\x08\x00\x00\x00", io.ErrUnexpectedEOF},
		"address of 5 bytes": {"HSKF\x01\x05\x7f\x00\x00\x01\x00\x00\x50", ErrHandshake},
		"address of 255":     {"HSKF\x01\xff" + strings.Repeat("x", 257), ErrHandshake},
		"port 0":             {"HSKF\x01\x00\x00\x00", ErrHandshake},
		"IPv4 as IPv6":       {"HSKF\x01\x10" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x00\x50", ErrHandshake},
		"no host's address":  {"HSKF\x01\x04\x00\x00\x00\x00\x00\x50", ErrHandshake},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := socketpair(t)
			defer guest.Close()
			io.WriteString(host, c.sent)
			host.Close()
			if target, err := ReadRequest(guest); !errors.Is(err, c.want) || target != (Target{}) {
				t.Errorf("%v, %v, want %v", target, err, c.want)
			}
		})
	}
}

// FuzzReadRequest feeds what a peer may send, in reads as short as they can be: a
// target is valid, is the one that was sent, and what follows it is left.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte(magic))
	for _, t := range targets {
		f.Add(append(appendRequest(nil, t), "flow"...))
	}
	f.Add([]byte("HSKF\x01\x05\x7f\x00\x00\x01\x00\x00\x50"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		rest := bytes.NewReader(sent)
		target, err := readRequest(iotest.OneByteReader(rest))
		if err != nil {
			return
		}
		if err := target.Validate(); err != nil {
			t.Error(err)
		}
		if again := appendRequest(nil, target); !bytes.HasPrefix(sent, again) || rest.Len() != len(sent)-len(again) {
			t.Errorf("%q: %v, %d bytes left", sent, target, rest.Len())
		}
	})
}

// FuzzAnswer feeds the host's end whatever a guest may answer: only one byte is
// taken, and only 0 is a yes.
func FuzzAnswer(f *testing.F) {
	for _, answer := range []string{"", "\x00", "\x6f", "\xff", "\x00flow"} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		rest := bytes.NewReader(answer)
		err := Request(t.Context(), readerConn{Reader: rest, Writer: io.Discard}, loopbackWeb)
		if yes := len(answer) > 0 && answer[0] == 0; yes != (err == nil) {
			t.Errorf("%q: %v", answer, err)
		}
		if len(answer) > 0 && rest.Len() != len(answer)-1 {
			t.Errorf("%q: %d bytes left", answer, rest.Len())
		}
	})
}

// FuzzFrames feeds the frames of a peer: read ones are those that were sent.
func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x00"))
	f.Add([]byte("\x00\x05hello\x00\x00\x00\x01"))
	f.Add(append([]byte("\xff\xff"), make([]byte, MaxFrame)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		frames := NewFrameReader(bytes.NewReader(sent))
		var again []byte
		for {
			b, err := frames.Next()
			if err != nil {
				if whole := len(again) == len(sent); whole != errors.Is(err, io.EOF) || whole == errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%d of %d bytes: %v", len(again), len(sent), err)
				}
				break
			}
			if again, err = AppendFrame(again, b); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(sent, again) {
			t.Errorf("%q: frames %q", sent, again)
		}
	})
}

// readerConn is a connection to a peer that has said all it says.
type readerConn struct {
	net.Conn // nil
	io.Reader
	io.Writer
}

func (c readerConn) Read(b []byte) (int, error)  { return c.Reader.Read(b) }
func (c readerConn) Write(b []byte) (int, error) { return c.Writer.Write(b) }
func (c readerConn) SetDeadline(time.Time) error { return nil }

// flowing joins two ends of a flow, and returns the sides of them that its client
// and its service have.
func flowing(t *testing.T, ctx context.Context) (client, service *net.TCPConn, done <-chan struct{}) {
	t.Helper()
	host, guest := socketpair(t)
	client, near := tcpPair(t)
	service, far := tcpPair(t)
	ended := make(chan struct{}, 2)
	for carrier, conn := range map[net.Conn]net.Conn{host: near, guest: far} {
		go func() {
			Copy(ctx, carrier, conn)
			ended <- struct{}{}
		}()
	}
	both := make(chan struct{})
	go func() {
		<-ended
		<-ended
		close(both)
	}()
	t.Cleanup(func() {
		select {
		case <-both:
		case <-time.After(limit):
			t.Error("Copy does not return")
		}
	})
	return client, service, both
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	one, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{one, other} {
		conn.SetDeadline(time.Now().Add(limit))
		t.Cleanup(func() { conn.Close() })
	}
	other.SetDeadline(time.Time{})
	return one.(*net.TCPConn), other.(*net.TCPConn)
}

func TestCopyKeepsHalfCloses(t *testing.T) {
	client, service, done := flowing(t, t.Context())
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		client.Write(big)
		client.CloseWrite()
	}()
	if got, err := io.ReadAll(service); !bytes.Equal(got, big) || err != nil {
		t.Errorf("the service reads %d bytes, %v", len(got), err)
	}
	go func() {
		service.Write(big)
		service.Close()
	}()
	if got, err := io.ReadAll(client); !bytes.Equal(got, big) || err != nil {
		t.Errorf("the client reads %d bytes, %v", len(got), err)
	}
	select {
	case <-done:
	case <-time.After(limit):
		t.Error("a flow that has ended both ways is not over")
	}
}

func TestCopyPassesAResetOn(t *testing.T) {
	for _, first := range []string{"client", "service", "context"} {
		ctx, cancel := context.WithCancel(t.Context())
		client, service, _ := flowing(t, ctx)
		fmt.Fprint(client, "x")
		if _, err := io.ReadFull(service, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		conns := []*net.TCPConn{client, service}
		switch first {
		case "client":
			client.SetLinger(0)
			client.Close()
			conns = conns[1:]
		case "service":
			service.SetLinger(0)
			service.Close()
			conns = conns[:1]
		case "context":
			cancel()
		}
		for _, conn := range conns {
			if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("after a reset of the %s: %v", first, err)
			}
		}
		cancel()
	}
}

// A client that has half-closed and then goes must not leave a service that sends
// for ever.
func TestCopyEndsAServiceWithoutClient(t *testing.T) {
	client, service, _ := flowing(t, t.Context())
	client.CloseWrite()
	if _, err := io.ReadAll(service); err != nil {
		t.Fatal(err)
	}
	client.Close()
	for b := make([]byte, 1<<16); ; {
		if _, err := service.Write(b); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the service is not told")
			}
			return
		}
	}
}

// What a peer does that breaks the rules resets the flow.
func TestCopyRefusesFramesAfterTheLast(t *testing.T) {
	for _, sent := range []string{"\x00\x00\x00\x01x", "\x00\x00\x00\x00", "\x00\x05x", "\x00"} {
		host, guest := socketpair(t)
		service, conn := tcpPair(t)
		done := make(chan struct{})
		go func() { Copy(t.Context(), guest, conn); close(done) }()
		io.WriteString(host, sent)
		host.(*net.UnixConn).CloseWrite()
		if _, err := service.Read(make([]byte, 1)); err == nil {
			t.Errorf("%q: a byte came through", sent)
		}
		select {
		case <-done:
		case <-time.After(limit):
			t.Errorf("%q: Copy does not return", sent)
		}
		host.Close()
	}
}
