package sockets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentforward "github.com/husk-containers/husk/agent/forward"
	agentsocket "github.com/husk-containers/husk/agent/socket"
	"github.com/husk-containers/husk/internal/hostns"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
	"github.com/husk-containers/husk/virtcontainers/dialer"
	"github.com/husk-containers/husk/virtcontainers/record"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

func TestMain(m *testing.M) {
	if dialer.Is(os.Args) {
		if err := dialer.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A rig is a table, and the agent's end of it in this process.
type rig struct {
	*testing.T
	*Table
	dir    string // of the guest's sockets
	agent  *agentsocket.Table
	port   string // guest port 1026
	log    lockedBuffer
	bundle string
	whose  atomic.Value // the container whose process connects, as the guest has it
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newRig(t *testing.T, allowed ...string) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("starts processes of other users: needs root")
	}
	if allowed == nil {
		allowed = []string{"/**"}
	}
	r := &rig{T: t, dir: filepath.Join(t.TempDir(), "guest"), port: filepath.Join(t.TempDir(), "1026"), bundle: t.TempDir()}
	r.Table = New(Options{
		Guest: r, Host: (*hostns.Namespace)(nil), Record: record.New(r.bundle, ""), Allowed: allowed,
		Log: slog.New(slog.NewTextHandler(&r.log, nil)),
	})
	r.agent = agentsocket.New(r.dir, func(c agentsocket.Connection) {
		whose, _ := r.whose.Load().(string)
		r.Event(&agentv1.SocketEvent{SocketId: c.Socket, Connection: c.Number, ContainerId: whose})
	})
	ln, err := net.Listen("unix", r.port)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := agentforward.Serve(ctx, ln, r.agent.Claim); err != nil {
			t.Error(err)
		}
	})
	serving.Go(func() { r.agent.Serve(ctx) })
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
		cancel()
		serving.Wait()
	})
	return r
}

// Call implements Guest.
func (r *rig) Call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error {
	return f(ctx, agentClient{table: r.agent})
}

// Dial implements Guest.
func (r *rig) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if port != forward.Port {
		return nil, fmt.Errorf("port %d", port)
	}
	return (&net.Dialer{}).DialContext(ctx, "unix", r.port)
}

// Lost implements Guest.
func (*rig) Lost(error) bool { return false }

// An agentClient makes the calls of a table of sockets.
type agentClient struct {
	agentv1.AgentClient
	table *agentsocket.Table
}

func (c agentClient) ListenSocket(_ context.Context, r *agentv1.ListenSocketRequest) (*agentv1.ListenSocketResponse, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return &agentv1.ListenSocketResponse{}, c.table.Listen(agentsocket.Socket{ID: r.SocketId, Mode: r.Mode, UID: r.Uid, GID: r.Gid})
}

func (c agentClient) CloseSocket(_ context.Context, r *agentv1.CloseSocketRequest) (*agentv1.CloseSocketResponse, error) {
	return &agentv1.CloseSocketResponse{}, c.table.Close(r.SocketId)
}

// add gives the container c a socket, and returns where it is in the guest.
func (r *rig) add(path string, edits ...func(*Socket)) (string, func(context.Context) error) {
	r.Helper()
	s := Socket{Container: "c", User: specs.User{UID: 65534, GID: 65534}, Path: path}
	for _, edit := range edits {
		edit(&s)
	}
	guestPath, remove, err := r.Add(r.Context(), s)
	if err != nil {
		r.Fatal(err)
	}
	name, ok := strings.CutPrefix(guestPath, agentv1.SocketsDir+"/")
	if !ok {
		r.Fatalf("guest path %s", guestPath)
	}
	return filepath.Join(r.dir, name), remove
}

// connect connects as a process of the container does.
func (r *rig) connect(path string) *net.UnixConn {
	r.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		r.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(limit))
	r.Cleanup(func() { conn.Close() })
	return conn.(*net.UnixConn)
}

// A server is one of the host.
type server struct {
	path string
	ln   *net.UnixListener
	work sync.WaitGroup
}

// serve listens on path and has each connection handled, which then is closed.
func serve(t *testing.T, path string, handle func(*net.UnixConn)) *server {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	s := &server{path: path, ln: ln}
	s.work.Go(func() {
		for {
			conn, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(limit))
			s.work.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(s.close)
	return s
}

// close ends the server and takes its file away.
func (s *server) close() {
	s.ln.Close()
	s.work.Wait()
}

// echo answers with what it is sent, when all of it has come.
func echo(conn *net.UnixConn) {
	b, err := io.ReadAll(conn)
	if err == nil {
		conn.Write(b)
	}
}

// hostPath is a path for a socket of the host.
func hostPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "husk-sockets")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// ask sends a question, half-closes and reads the answer.
func ask(path, question string) (string, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(conn, question); err != nil {
		return "", err
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

// eventually waits for what has no event in a test.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

var errStill = errors.New("not yet")
