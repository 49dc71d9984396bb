package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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
