package qmp

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// socketpair returns the two ends of a connection, closed at the end of the test.
func socketpair(t *testing.T) (client *net.UnixConn, server *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "client")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	server = os.NewFile(uintptr(fds[1]), "server")
	t.Cleanup(func() { conn.Close(); server.Close() })
	return conn.(*net.UnixConn), server
}

// A fakeQEMU is the server's end, played by a script.
type fakeQEMU struct {
	t    *testing.T
	conn *net.UnixConn
	in   *bufio.Reader
}

func newFake(t *testing.T) (*fakeQEMU, *net.UnixConn) {
	t.Helper()
	client, file := socketpair(t)
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	t.Cleanup(func() { conn.Close() })
	return &fakeQEMU{t: t, conn: conn.(*net.UnixConn), in: bufio.NewReader(conn)}, client
}

func (f *fakeQEMU) send(lines ...string) {
	if _, err := io.WriteString(f.conn, strings.Join(lines, "\r\n")+"\r\n"); err != nil {
		f.t.Error(err)
	}
}

func (f *fakeQEMU) receive() (cmd struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
},
) {
	line, err := f.in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &cmd)
	}
	if err != nil {
		f.t.Error(err)
	}
	return cmd
}

// connect negotiates; after it the next id is 2.
func connect(t *testing.T) (*Client, *fakeQEMU) {
	t.Helper()
	f, conn := newFake(t)
	negotiated := make(chan struct{})
	go func() {
		defer close(negotiated)
		f.send(hello)
		if got := f.receive(); got.Execute != "qmp_capabilities" || got.ID != 1 {
			t.Errorf("first command = %+v", got)
		}
		f.send(`{"return": {}, "id": 1}`)
	}()
	c, err := New(t.Context(), conn)
	<-negotiated
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, f
}
