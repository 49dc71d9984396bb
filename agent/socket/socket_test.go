package socket

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// A guest is a table in this process.
type guest struct {
	*testing.T
	*Table
	end      context.CancelFunc
	served   chan error
	reported chan Connection
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	reported := make(chan Connection, 20000)
	g := &guest{T: t, reported: reported, served: make(chan error, 1)}
	g.Table = New(filepath.Join(t.TempDir(), "sockets"), func(c Connection) { reported <- c })
	ctx, cancel := context.WithCancel(t.Context())
	g.end = cancel
	go func() { g.served <- g.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		g.wait()
	})
	return g
}

// wait waits until Serve has returned.
func (g *guest) wait() {
	g.Helper()
	select {
	case err := <-g.served:
		g.served <- err
		if err != nil {
			g.Error(err)
		}
	case <-time.After(limit):
		g.Fatal("Serve does not return")
	}
}

func (g *guest) listen(s Socket) {
	g.Helper()
	if err := g.Listen(s); err != nil {
		g.Fatal(err)
	}
}

func (g *guest) path(id string) string { return filepath.Join(g.dir, id) }

// dial connects as a process of the guest does.
func (g *guest) dial(path string) *net.UnixConn {
	g.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		g.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(limit))
	g.Cleanup(func() { conn.Close() })
	return conn.(*net.UnixConn)
}

// next is the next connection that is reported.
func (g *guest) next() Connection {
	g.Helper()
	select {
	case r := <-g.reported:
		return r
	case <-time.After(limit):
		g.Fatal("nothing is reported")
		return Connection{}
	}
}

func TestConnectionsWaitForTheirClaim(t *testing.T) {
	g := newGuest(t)
	long := strings.Repeat("x", 128) // too long for an address
	g.listen(Socket{ID: "a", Mode: 0o777})
	g.listen(Socket{ID: long, Mode: 0o777})
	if _, err := os.Lstat(g.path(long)); err != nil {
		t.Error(err)
	}
	client := g.dial(g.path("a"))
	r := g.next()
	if r.Socket != "a" || r.Number == 0 || r.PID != os.Getpid() {
		t.Errorf("reported %v", r)
	}
	conn, err := g.Claim(r.Number)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go io.WriteString(client, "x")
	if b := make([]byte, 1); b[0] == 0 {
		if _, err := io.ReadFull(conn, b); err != nil || b[0] != 'x' {
			t.Errorf("read %q, %v", b, err)
		}
	}
	for _, number := range []uint64{0, r.Number, r.Number + 1} {
		if _, err := g.Claim(number); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("claim %d: %v", number, err)
		}
	}
}

func TestSocketHasModeAndOwner(t *testing.T) {
	g := newGuest(t)
	s := Socket{ID: "a", Mode: 0o640, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	if os.Geteuid() == 0 {
		s.UID, s.GID = 1234, 5678
	}
	check := func() {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(g.path("a"), &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode != unix.S_IFSOCK|s.Mode || st.Uid != s.UID || st.Gid != s.GID {
			t.Errorf("mode %o, owner %d:%d, want %+v", st.Mode, st.Uid, st.Gid, s)
		}
	}
	g.listen(s)
	check()
	client := g.dial(g.path("a"))
	s.Mode = 0o777
	g.listen(s) // again
	check()
	// It is the same socket still.
	if conn, err := g.Claim(g.next().Number); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	if _, err := io.ReadAll(client); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsWhatWaits(t *testing.T) {
	g := newGuest(t)
	g.listen(Socket{ID: "a", Mode: 0o777})
	claimed, waiting := g.dial(g.path("a")), g.dial(g.path("a"))
	conn, err := g.Claim(g.next().Number)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	number := g.next().Number
	for range 2 { // idempotent
		if err := g.Close("a"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadAll(waiting); err != nil {
		t.Errorf("one that waits: %v", err)
	}
	if _, err := g.Claim(number); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("claim of one that has been closed: %v", err)
	}
	// As on a host, a connection outlives the name.
	go io.WriteString(conn, "x")
	if _, err := io.ReadFull(claimed, make([]byte, 1)); err != nil {
		t.Errorf("one that was claimed: %v", err)
	}
	if _, err := os.Lstat(g.path("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is left: %v", err)
	}
	g.listen(Socket{ID: "a", Mode: 0o777})
	g.dial(g.path("a"))
	if again := g.next(); again.Number <= number {
		t.Errorf("number %d comes after %d", again.Number, number)
	}
}

// More connections than may wait are not accepted, until others are claimed.
func TestConnectionsThatWaitAreBounded(t *testing.T) {
	g := newGuest(t)
	g.listen(Socket{ID: "a", Mode: 0o777})
	g.listen(Socket{ID: "b", Mode: 0o777})
	const extra = 50
	for range maxPending + extra {
		g.dial(g.path("a"))
	}
	var numbers []uint64
	for range maxPending {
		numbers = append(numbers, g.next().Number)
	}
	// Another socket has room of its own, and by its report it is known that
	// none more of the first came.
	g.dial(g.path("b"))
	if r := g.next(); r.Socket != "b" {
		t.Errorf("%v is reported, and %d wait", r, maxPending)
	}
	for range extra {
		conn, err := g.Claim(numbers[0])
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		numbers = append(numbers[1:], g.next().Number)
	}
}

func TestServeEndsWithEverything(t *testing.T) {
	g := newGuest(t)
	g.listen(Socket{ID: "a", Mode: 0o777})
	client := g.dial(g.path("a"))
	g.next()
	for range maxPending + 5 {
		g.dial(g.path("a"))
	}
	g.end()
	g.wait()
	if _, err := io.ReadAll(client); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(g.dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := g.Listen(Socket{ID: "b"}); !errdefs.IsUnavailable(err) {
		t.Errorf("listen afterwards: %v", err)
	}
}

func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	g := newGuest(t)
	g.listen(Socket{ID: "a", Mode: 0o777})
	count := func() (goroutines, fds int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return runtime.NumGoroutine(), len(entries)
	}
	goroutines, fds := count()
	const connections = 10000
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() {
			for i := range connections / 20 {
				conn, err := net.Dial("unix", g.path("a"))
				if err != nil {
					t.Error(err)
					return
				}
				if i%10 > 0 { // else it goes at once
					io.Copy(io.Discard, conn)
				}
				conn.Close()
			}
		})
	}
	for range connections {
		conn, err := g.Claim(g.next().Number)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	clients.Wait()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		n, f := count()
		g.mu.Lock()
		waiting := len(g.pending)
		g.mu.Unlock()
		if n <= goroutines && f <= fds && waiting == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines and %d descriptors, %d and %d before; %d wait", n, f, goroutines, fds, waiting)
		}
	}
}
