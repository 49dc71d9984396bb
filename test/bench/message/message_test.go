package message

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// dialer listens in a directory of the test's, has serve answer, and returns a way
// to connect.
func dialer(t *testing.T, serve func(net.Listener) error) func() *net.UnixConn {
	t.Helper()
	addr := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- serve(l) }()
	t.Cleanup(func() {
		l.Close()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return func() *net.UnixConn {
		conn, err := net.DialUnix("unix", nil, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
}

func TestEveryMessageComesBack(t *testing.T) {
	dial := dialer(t, Serve)
	for _, size := range []int{1, 8, 4 << 10, 4 << 20} {
		times, err := Echo(dial(), size, 3)
		if err != nil || len(times) != 3 {
			t.Errorf("messages of %d bytes: %d times, %v", size, len(times), err)
		}
		for _, took := range times {
			if took <= 0 {
				t.Errorf("a message took %v", took)
			}
		}
	}
}

func TestSendCountsWhatTheServerHad(t *testing.T) {
	dial := dialer(t, Serve)
	for _, size := range []int{8, 1 << 20} {
		s, err := Send(dial(), size, 20*time.Millisecond)
		if err != nil || s.Bytes == 0 || s.Bytes%uint64(size) != 0 || s.Took < 20*time.Millisecond {
			t.Errorf("messages of %d bytes: %+v, %v", size, s, err)
		}
	}
}

// once serves the first connection with f.
func once(f func(net.Conn) error) func(net.Listener) error {
	return func(l net.Listener) error {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
		return f(conn)
	}
}

func TestAStreamThatLosesBytesIsAnError(t *testing.T) {
	dial := dialer(t, once(func(conn net.Conn) error {
		if _, err := io.ReadFull(conn, make([]byte, headerSize+1)); err != nil {
			return err
		}
		return count(conn)
	}))
	if _, err := Send(dial(), 8, time.Millisecond); err == nil || !strings.Contains(err.Error(), "the server had") {
		t.Errorf("Send: %v, want what is missing", err)
	}
}

func TestAnotherMessageIsAnError(t *testing.T) {
	dial := dialer(t, once(func(conn net.Conn) error {
		message := make([]byte, headerSize+8)
		if _, err := io.ReadFull(conn, message); err != nil {
			return err
		}
		message[headerSize]++
		_, err := conn.Write(message[headerSize:])
		return err
	}))
	if _, err := Echo(dial(), 8, 1); err == nil || !strings.Contains(err.Error(), "as another") {
		t.Errorf("Echo: %v, want that it is another message", err)
	}
}

func TestTheServerEndsWhatItDoesNotKnow(t *testing.T) {
	dial := dialer(t, Serve)
	for name, header := range map[string][]byte{
		"kind": {'x', 0, 0, 0, 8}, "no size": {kindEcho, 0, 0, 0, 0},
		"size": binary.BigEndian.AppendUint32([]byte{kindEcho}, maxSize+1), "end": {kindStream, 0},
	} {
		conn := dial()
		if _, err := conn.Write(header); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || len(got) > 0 {
			t.Errorf("%s: %q, %v; want the end", name, got, err)
		}
	}
}

func TestSizesOutOfRangeAreRefused(t *testing.T) {
	dial := dialer(t, Serve)
	for _, size := range []int{-1, 0, maxSize + 1} {
		if _, err := Echo(dial(), size, 1); err == nil {
			t.Errorf("messages of %d bytes are sent", size)
		}
	}
}
