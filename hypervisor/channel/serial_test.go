package channel

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"

	guestchannel "github.com/husk-containers/husk/agent/channel"
	"github.com/husk-containers/husk/internal/portmux"
)

func TestSerialParam(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := s.Kind() + " " + s.GuestParam(); got != "virtio-serial husk.channel=virtio-serial" {
		t.Error(got)
	}
}

// Nothing is written before the guest has spoken: a port that the guest has not
// opened may lose it.
func TestSerialGuestSpeaksFirst(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	guest := guestEnd(t, s)
	defer guest.Close()
	ctx, cancel := context.WithCancel(context.Background())
	dialed := make(chan error)
	go func() {
		_, err := s.Dial(ctx, testPort)
		dialed <- err
	}()
	cancel()
	if err := <-dialed; !errors.Is(err, context.Canceled) {
		t.Errorf("Dial: %v", err)
	}
	s.Close()
	if b, err := io.ReadAll(guest); len(b) > 0 || err != nil {
		t.Errorf("host wrote %q, %v", b, err)
	}
}

func TestSerialGarbage(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	guest := guestEnd(t, s)
	defer guest.Close()
	dialed := make(chan error)
	go func() {
		_, err := s.Dial(context.Background(), testPort)
		dialed <- err
	}()
	if _, err := io.WriteString(guest, "Linux version 6.1.0\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Accept(context.Background()); !errors.Is(err, portmux.ErrProtocol) {
		t.Errorf("Accept: %v", err)
	}
	if err := <-dialed; !errors.Is(err, portmux.ErrProtocol) {
		t.Errorf("Dial: %v", err)
	}
}

// The end of the VMM ends every connection, with an error and not with io.EOF.
func TestSerialVMMGone(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	vmm := guestEnd(t, s)
	guest := guestchannel.NewSerial(once(vmm))
	defer guest.Close()
	if _, err := guest.DialControl(testContext(t)); err != nil {
		t.Fatal(err)
	}
	conn, err := s.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	vmm.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("Read: %v", err)
	}
	if _, err := s.Accept(context.Background()); err == nil {
		t.Error("accepted from a VMM that has gone")
	}
}

// once returns an opener that yields conn and then waits.
func once(conn io.ReadWriteCloser) func(context.Context) (io.ReadWriteCloser, error) {
	next := make(chan io.ReadWriteCloser, 1)
	next <- conn
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case c := <-next:
			return c, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// The guest keeps its listeners and finds the next host.
func TestSerialReconnect(t *testing.T) {
	ports := make(chan io.ReadWriteCloser)
	guest := guestchannel.NewSerial(func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case p := <-ports:
			return p, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	})
	defer guest.Close()
	l, err := guest.Listen(testPort)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go echo(conn)
		}
	}()
	for i := range 3 {
		s, err := OpenSerial()
		if err != nil {
			t.Fatal(err)
		}
		ports <- guestEnd(t, s)
		control, err := guest.DialControl(testContext(t))
		if err != nil {
			t.Fatalf("host %d: %v", i, err)
		}
		if _, err := s.Accept(testContext(t)); err != nil {
			t.Fatalf("host %d: %v", i, err)
		}
		conn, err := s.Dial(testContext(t), testPort)
		if err != nil {
			t.Fatalf("host %d: %v", i, err)
		}
		if err := roundTrip(conn, []byte("hello")); err != nil {
			t.Fatalf("host %d: %v", i, err)
		}
		s.Close()
		if _, err := control.Read(make([]byte, 1)); err == nil {
			t.Errorf("host %d: control connection outlives it", i)
		}
	}
}

func TestSerialAcceptsControlOnly(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	mux, err := portmux.New(guestEnd(t, s), false)
	if err != nil {
		t.Fatal(err)
	}
	defer mux.Close()
	for _, port := range []uint32{testPort, portmux.ControlPort} {
		conn, err := mux.Dial(testContext(t), port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if port != portmux.ControlPort {
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("port %d: %v", port, err)
			}
		}
	}
	if _, err := s.Accept(testContext(t)); err != nil {
		t.Error(err)
	}
}

// GuestFile survives being handed over and closed by its user.
func TestSerialGuestFile(t *testing.T) {
	s, err := OpenSerial()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.GuestFile().Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Accept(testContext(t)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Accept without a VMM: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Accept(testContext(t)); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("the first cause is lost: %v", err)
	}
}
