package portmux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// pipe returns both ends of a stream socket.
func pipe(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func newMux(t testing.TB, conn io.ReadWriteCloser, client bool) *Mux {
	t.Helper()
	m, err := New(conn, client)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func muxes(t testing.TB) (a, b *Mux) {
	t.Helper()
	ca, cb := pipe(t)
	return newMux(t, ca, true), newMux(t, cb, false)
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// connected returns both ends of a connection from a to b.
func connected(t testing.TB, a, b *Mux, port uint32) (dialed, accepted net.Conn) {
	t.Helper()
	dialed, err := a.Dial(testContext(t), port)
	if err != nil {
		t.Fatal(err)
	}
	got, accepted, err := b.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if got != port {
		t.Fatalf("accepted port %d, dialed %d", got, port)
	}
	return dialed, accepted
}

func frame(version, kind byte, flags uint16, id, length uint32, body ...byte) []byte {
	b := []byte{version, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, length)
	return append(b, body...)
}

const (
	syn = 1
	fin = 4
)

func TestPortsBothWays(t *testing.T) {
	a, b := muxes(t)
	for _, port := range []uint32{0, 1025, 1<<32 - 1} {
		for _, m := range [][2]*Mux{{a, b}, {b, a}} {
			dialed, accepted := connected(t, m[0], m[1], port)
			dialed.Close()
			if _, err := accepted.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read after the peer's Close: %v", err)
			}
			accepted.Close()
		}
	}
}

// What arrived before the carrier was lost stays readable, and only a
// connection that the peer has closed ends with io.EOF.
func TestCarrierLost(t *testing.T) {
	a, b := muxes(t)
	whole, wholePeer := connected(t, a, b, 1)
	cut, cutPeer := connected(t, a, b, 2)
	idle, idlePeer := connected(t, a, b, 3)
	for _, conn := range []net.Conn{wholePeer, cutPeer} {
		if _, err := io.WriteString(conn, "data"); err != nil {
			t.Fatal(err)
		}
	}
	wholePeer.(*Conn).CloseWrite()
	if _, err := io.WriteString(idlePeer, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(idle, make([]byte, 1)); err != nil { // so all before it has arrived
		t.Fatal(err)
	}
	b.Close()
	<-a.Done()
	if got, err := io.ReadAll(whole); string(got) != "data" || err != nil {
		t.Errorf("closed by the peer before: %q, %v", got, err)
	}
	if got, err := io.ReadAll(cut); string(got) != "data" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut short: %q, %v", got, err)
	}
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read: %v", err)
	}
	if _, err := idle.Write([]byte("x")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("write: %v", err)
	}
	if _, err := a.Dial(context.Background(), 1); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Dial: %v", err)
	}
	if _, _, err := a.Accept(context.Background()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Accept: %v", err)
	}
}

func TestProtocolViolations(t *testing.T) {
	open := append(frame(0, typeWindow, syn, 1, 0), frame(0, typeData, 0, 1, 4, 0, 0, 0, 9)...)
	for _, c := range []struct {
		name  string
		bytes []byte
	}{
		{"text", []byte("GET / HTTP/1.1\r\n\r\n")},
		{"version", frame(1, typeData, 0, 1, 0)},
		{"ping", frame(0, 2, syn, 0, 1)},
		{"go away", frame(0, 3, 0, 0, 0)},
		{"unknown type", frame(0, 4, 0, 0, 0)},
		{"long frame", frame(0, typeData, syn, 1, maxFrame+1)},
		{"grant above the window", frame(0, typeWindow, syn, 1, window+1)},
		{"stream opened twice", append(open, open...)},
		{"closed twice", append(open, append(frame(0, typeWindow, fin, 1, 0), frame(0, typeWindow, fin, 1, 0)...)...)},
		{"more data than granted", append(open, bytes.Repeat(frame(0, typeData, 0, 1, maxFrame, make([]byte, maxFrame)...), window/maxFrame)...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			peer, conn := pipe(t)
			m := newMux(t, conn, false)
			go io.Copy(io.Discard, peer)
			go peer.Write(c.bytes)
			defer peer.Close()
			select {
			case <-m.Done():
			case <-testContext(t).Done():
				t.Fatal("still there")
			}
			if !errors.Is(m.Err(), ErrProtocol) {
				t.Errorf("ended with %v", m.Err())
			}
		})
	}
}

// A peer that opens connections without end is held back, not served.
func TestPendingIsBounded(t *testing.T) {
	peer, conn := pipe(t)
	m := newMux(t, conn, false)
	defer peer.Close()
	go io.Copy(io.Discard, peer)
	for id := range uint32(1000) {
		b := frame(0, typeWindow, syn, 2*id+1, 0)
		if _, err := peer.Write(append(b, frame(0, typeData, 0, 2*id+1, 4, 0, 0, 0, 9)...)); err != nil {
			t.Fatal(err)
		}
	}
	// Frames are handled in order: when this one has been, so have all others.
	peer.Write(frame(9, 0, 0, 0, 0))
	<-m.Done()
	if n := m.session.NumStreams(); n > 2*maxPending+1 {
		t.Errorf("%d connections held for a peer that was never accepted", n)
	}
}

// A frame whose body is withheld holds no reader's deadline up.
func TestBodyWithheld(t *testing.T) {
	peer, conn := pipe(t)
	defer peer.Close()
	m := newMux(t, conn, false)
	go io.Copy(io.Discard, peer)
	peer.Write(append(frame(0, typeWindow, syn, 1, 0), frame(0, typeData, 0, 1, 4, 0, 0, 0, 9)...))
	_, c, err := m.Accept(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	peer.Write(frame(0, typeData, 0, 1, 4, 'x'))
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := c.Read(make([]byte, 4)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d, %v", n, err)
	}
}

// A peer that never closes its half cannot make us keep connections for ever.
func TestUnfinishedIsBounded(t *testing.T) {
	peer, conn := pipe(t)
	m := newMux(t, conn, true)
	defer peer.Close()
	go func() { // acknowledges every stream and does nothing else
		for id := uint32(1); ; id += 2 {
			if _, err := io.ReadFull(peer, make([]byte, 12)); err != nil {
				return
			}
			peer.Write(frame(0, typeWindow, 2, id, 0))
			if _, err := io.ReadFull(peer, make([]byte, 12+4+12)); err != nil {
				return
			}
		}
	}()
	for i := range maxConns + 1 {
		c, err := m.Dial(testContext(t), 1)
		if i == maxConns {
			if err == nil {
				t.Fatalf("dialed more than %d connections", maxConns)
			}
			break
		}
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
	}
}

// A peer that does not read stalls writers, but neither Dial nor Close.
func TestStalledCarrier(t *testing.T) {
	peer, conn := pipe(t)
	defer peer.Close()
	m := newMux(t, conn, true)
	go func() { // grants a window and reads nothing
		for range 64 {
			peer.Write(frame(0, typeWindow, 0, 1, window))
		}
	}()
	c, err := m.Dial(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, 32<<20))
		wrote <- err
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	for err == nil { // until there is no room left in the queues
		var other net.Conn
		if other, err = m.Dial(ctx, 2); err == nil {
			other.Close()
		}
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial: %v", err)
	}
	c.Close()
	m.Close()
	if err := <-wrote; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
}

// A carrier whose Write times out ends the Mux.
func TestWriteTimeout(t *testing.T) {
	peer, conn := pipe(t)
	defer peer.Close()
	if err := conn.SetWriteDeadline(past); err != nil {
		t.Fatal(err)
	}
	m := newMux(t, conn, true)
	m.Dial(testContext(t), 1)
	<-m.Done()
	if !errors.Is(m.Err(), os.ErrDeadlineExceeded) {
		t.Errorf("ended with %v", m.Err())
	}
}

// A peer that withholds its port holds nobody up.
func TestHeaderWithheld(t *testing.T) {
	a, b := muxes(t)
	stream, err := a.session.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	connected(t, a, b, 7)
}

func TestAcceptContext(t *testing.T) {
	a, _ := muxes(t)
	why := errors.New("given up")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(why)
	if _, _, err := a.Accept(ctx); !errors.Is(err, why) {
		t.Errorf("Accept: %v", err)
	}
}

// source reads from b, then ends; writes are dropped.
type source struct{ b []byte }

func (s *source) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.b)
	s.b = s.b[n:]
	return n, nil
}
func (s *source) Write(p []byte) (int, error) { return len(p), nil }
func (s *source) Close() error                { return nil }

// FuzzPeer feeds what a guest may write to the host's end: whatever it is, the
// Mux ends with an error when the carrier does, and nothing is left running.
func FuzzPeer(f *testing.F) {
	open := append(frame(0, typeWindow, syn, 2, 0), frame(0, typeData, 0, 2, 5, 0, 0, 4, 0, 'x')...)
	f.Add([]byte(nil))
	f.Add(open)
	f.Add(append(open, frame(0, typeWindow, fin, 2, 0)...))
	f.Add(append(open, frame(0, typeWindow, 8, 2, 0)...))
	f.Add(append(open, frame(0, 3, 0, 0, 1)...))
	f.Add(append(open, frame(0, 2, 1, 0, 1)...))
	f.Add(append(open, open...))
	f.Add(frame(0, typeData, syn|fin, 2, 4, 0, 0, 4, 0))
	f.Add(frame(0, typeWindow, 2, 1, 1<<20))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := New(&source{b: b}, true)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		for {
			_, conn, err := m.Accept(context.Background())
			if err != nil {
				break
			}
			io.Copy(io.Discard, conn)
			conn.Write([]byte("answer"))
			conn.Close()
		}
		if m.Err() == nil {
			t.Error("Accept failed on a live Mux")
		}
	})
}
