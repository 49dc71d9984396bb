package sockets

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/record"
)

func TestManyConnectionsAtOnce(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, echo)
	guest, _ := r.add(path)
	var clients sync.WaitGroup
	for i := range 100 {
		clients.Go(func() {
			question := strings.Repeat(fmt.Sprintf("%08d", i), 1<<14)
			if answer, err := ask(guest, question); answer != question || err != nil {
				t.Errorf("%d: %d of %d bytes, %v", i, len(answer), len(question), err)
			}
		})
	}
	clients.Wait()
}

// The server half-closes first, and reads on.
func TestServerHalfCloses(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	got := make(chan string, 1)
	serve(t, path, func(conn *net.UnixConn) {
		io.WriteString(conn, "hello")
		conn.CloseWrite()
		b, _ := io.ReadAll(conn)
		got <- string(b)
	})
	guest, _ := r.add(path)
	conn := r.connect(guest)
	if b, err := io.ReadAll(conn); string(b) != "hello" || err != nil {
		t.Errorf("the client reads %q, %v", b, err)
	}
	io.WriteString(conn, "goodbye")
	conn.Close()
	if text := <-got; text != "goodbye" {
		t.Errorf("the server reads %q", text)
	}
}

// A server that does not read holds the client back, and none of it is lost.
func TestBackPressure(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	read, total := make(chan struct{}), make(chan int64, 1)
	serve(t, path, func(conn *net.UnixConn) {
		<-read
		n, _ := io.Copy(io.Discard, conn)
		total <- n
	})
	guest, _ := r.add(path)
	conn := r.connect(guest)
	conn.SetWriteDeadline(time.Now().Add(2 * time.Second))
	var sent int64
	for b := make([]byte, 64<<10); ; {
		n, err := conn.Write(b)
		if sent += int64(n); err != nil {
			break
		}
		if sent > 8<<20 {
			t.Fatal("8 MiB are under way that nobody reads")
		}
	}
	conn.Close()
	close(read)
	if n := <-total; n != sent {
		t.Errorf("the server reads %d of %d bytes", n, sent)
	}
}

// The container's peer closes: it is told so though it never writes.
func TestServerCloses(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, func(conn *net.UnixConn) { io.WriteString(conn, "bye") })
	guest, _ := r.add(path)
	conn := r.connect(guest)
	if b, err := io.ReadAll(conn); string(b) != "bye" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	eventually(t, "a write fails", func() error {
		if _, err := conn.Write([]byte("x")); errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		return errStill
	})
}

func TestServerVanishesAndComesBack(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	s := serve(t, path, echo)
	guest, _ := r.add(path)
	want := func(answer string) {
		t.Helper()
		for range 3 {
			got, err := ask(guest, "question")
			if got != answer || answer != "" && err != nil {
				t.Errorf("answer %q, %v, want %q", got, err, answer)
			}
			if answer == "" && err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ENOTCONN) {
				t.Errorf("without a server: %v", err)
			}
		}
	}
	want("question")
	s.close() // and takes the file away
	want("")
	s = serve(t, path, echo)
	want("question")
	s.ln.SetUnlinkOnClose(false)
	s.close() // and leaves the file
	want("")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/run", path); err != nil { // where it was resolved to there is a link now
		t.Fatal(err)
	}
	want("")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	serve(t, path, echo)
	want("question")
	if logged := strings.Count(r.log.String(), "is reset"); logged != 3 {
		t.Errorf("%d lines for three causes:\n%s", logged, r.log.String())
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	r := newRig(t)
	path, other := hostPath(t), hostPath(t)
	served := make(chan struct{}, 2*maxPerSocket)
	serve(t, path, func(conn *net.UnixConn) {
		served <- struct{}{}
		io.Copy(io.Discard, conn)
	})
	serve(t, other, echo)
	guest, _ := r.add(path)
	guestOther, _ := r.add(other)
	const extra = 40 // more than wait in the agent
	var conns []*net.UnixConn
	for range maxPerSocket + extra {
		conns = append(conns, r.connect(guest))
	}
	for range maxPerSocket {
		<-served
	}
	// Another socket is not kept waiting.
	if got, err := ask(guestOther, "x"); got != "x" || err != nil {
		t.Errorf("another socket: %q, %v", got, err)
	}
	if n := len(served); n > 0 {
		t.Errorf("%d more than %d connections are open", n, maxPerSocket)
	}
	for _, conn := range conns[:extra] {
		conn.Close()
	}
	for range extra {
		select {
		case <-served:
		case <-time.After(limit):
			t.Fatal("one that waits is not served when there is room")
		}
	}
}

func count(t *testing.T, pid int) (fds int) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	r := newRig(t)
	path, dead := hostPath(t), hostPath(t)
	serve(t, path, echo)
	refusing := serve(t, dead, echo)
	guest, _ := r.add(path)
	guestDead, _ := r.add(dead)
	refusing.ln.SetUnlinkOnClose(false)
	refusing.close()
	one := func(i int) error {
		switch i % 10 {
		case 0: // goes at once
			conn, err := net.Dial("unix", guest)
			if err == nil {
				conn.Close()
			}
			return err
		case 1:
			if got, _ := ask(guestDead, "x"); got != "" {
				return fmt.Errorf("a dead server answers %q", got)
			}
			return nil
		}
		got, err := ask(guest, "x")
		if got != "x" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return nil
	}
	for i := range 10 {
		if err := one(i); err != nil {
			t.Fatal(err)
		}
	}
	helper := r.containers["c"].process().PID()
	idle := func() (goroutines, fds, helpers int) {
		return runtime.NumGoroutine(), count(t, os.Getpid()), count(t, helper)
	}
	goroutines, fds, helpers := idle()
	numbers := make(chan int)
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() {
			for i := range numbers {
				if err := one(i); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
			}
		})
	}
	for i := range 10000 {
		numbers <- i
	}
	close(numbers)
	clients.Wait()
	eventually(t, "everything is given back", func() error {
		if g, f, h := idle(); g > goroutines || f > fds || h > helpers || len(r.slots) > 0 {
			return fmt.Errorf("%d goroutines, %d and %d descriptors, %d slots; %d, %d and %d before", g, f, h, len(r.slots), goroutines, fds, helpers)
		}
		return nil
	})
}

// A container's end is the end of its connections, of their process, of its cgroup,
// and of what is on record.
func TestRemoveContainer(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	peers := make(chan *unix.Ucred, 10)
	serve(t, path, func(conn *net.UnixConn) {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		raw.Control(func(fd uintptr) {
			cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			if err != nil {
				t.Error(err)
			}
			peers <- cred
		})
		io.WriteString(conn, "!")
		io.Copy(io.Discard, conn)
	})
	cgroupPath := fmt.Sprintf("/husk-test-sockets-%d", os.Getpid())
	named := func(s *Socket) {
		s.CgroupsPath, s.User = cgroupPath, specs.User{UID: 1234, GID: 5678, AdditionalGids: []uint32{9}}
	}
	guest, remove := r.add(path, named)
	connect := func() *net.UnixConn {
		t.Helper()
		conn := r.connect(guest)
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	first, second := connect(), connect()
	a, b := <-peers, <-peers
	if a.Uid != 1234 || a.Gid != 5678 || *a != *b {
		t.Errorf("the server's peers are %+v and %+v, want 1234:5678 and one process", a, b)
	}
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.Pid))
	if err != nil || !strings.Contains(string(cgroups), ":"+cgroupPath+"\n") {
		t.Errorf("the peer is in %q, %v", cgroups, err)
	}
	for range 2 {
		if err := remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := net.Dial("unix", guest); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a socket that was taken away: %v", err)
	}
	if _, err := first.Write([]byte("x")); err != nil {
		t.Errorf("a connection ends with its socket's name: %v", err)
	}
	guest, _ = r.add(path, named)
	third := connect()
	if c := <-peers; c.Pid != a.Pid {
		t.Errorf("another process, %d, connects, and %d lives", c.Pid, a.Pid)
	}
	for range 2 {
		if err := r.RemoveContainer(t.Context(), "c"); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range []net.Conn{first, second, third} {
		if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a connection is left: %v", err)
		}
	}
	if err := unix.Kill(int(a.Pid), 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the process is left: %v", err)
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupPath); len(left) > 0 {
		t.Errorf("cgroups are left: %q", left)
	}
	raw, err := os.ReadFile(filepath.Join(r.bundle, "husk.json"))
	if err != nil || strings.Contains(string(raw), "dialer") || strings.Contains(string(raw), cgroupPath) {
		t.Errorf("on record: %s, %v", raw, err)
	}
	// A container of the same name comes after it.
	guest, _ = r.add(path, named)
	connect()
	<-peers
}

// After a crash of the shim the record tells of all that is left.
func TestCleanupAfterACrash(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, echo)
	cgroupPath := fmt.Sprintf("/husk-test-crash-%d", os.Getpid())
	r.add(path, func(s *Socket) { s.CgroupsPath = cgroupPath })
	pid := r.containers["c"].process().PID()
	if err := record.Cleanup(t.Context(), r.bundle); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupPath); len(left) > 0 {
		t.Errorf("cgroups are left: %q", left)
	}
	eventually(t, "the process has ended", func() error {
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
			return errStill
		}
		return nil
	})
}

func TestProcessThatWasKilledIsReplaced(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, echo)
	guest, _ := r.add(path)
	for range 3 {
		if err := unix.Kill(r.containers["c"].process().PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		var clients sync.WaitGroup
		for range 5 {
			clients.Go(func() {
				if got, err := ask(guest, "x"); got != "x" || err != nil {
					t.Errorf("%q, %v", got, err)
				}
			})
		}
		clients.Wait()
	}
}

// Containers that share a directory share its sockets; each connects in its own name.
func TestSharedSocket(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	uids := make(chan uint32, 10)
	serve(t, path, func(conn *net.UnixConn) {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		raw.Control(func(fd uintptr) {
			cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			if err != nil {
				t.Error(err)
			}
			uids <- cred.Uid
		})
		echo(conn)
	})
	add := func(container string, uid uint32) (string, func(context.Context) error) {
		t.Helper()
		return r.add(path, func(s *Socket) {
			s.Container, s.User = container, specs.User{UID: uid, GID: uid}
			s.Over = agentv1.GuestDir + "/share/dir/s"
		})
	}
	guest, removeA := add("a", 1001)
	if again, _ := add("b", 1002); again != guest {
		t.Errorf("two sockets, %s and %s, over one", guest, again)
	}
	want := func(whose string, uid uint32) {
		t.Helper()
		r.whose.Store(whose)
		got, err := ask(guest, "x")
		if uid == 0 {
			if got != "" {
				t.Errorf("a connection of %q is answered %q", whose, got)
			}
			return
		}
		if got != "x" || err != nil {
			t.Fatalf("a connection of %q is answered %q, %v", whose, got, err)
		}
		if by := <-uids; by != uid {
			t.Errorf("a connection of %q is made by %d", whose, by)
		}
	}
	want("a", 1001)
	want("b", 1002)
	want("", 0)
	want("stranger", 0)
	for range 2 {
		if err := removeA(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want("b", 1002)
	want("", 1002) // it can be no other's
	want("a", 0)   // which had it
	if err := r.RemoveContainer(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("unix", guest); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("after the last: %v", err)
	}
}

func TestAddRefuses(t *testing.T) {
	path := hostPath(t)
	serve(t, path, echo)
	dir := filepath.Dir(path)
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "file")
	if err := errors.Join(os.Symlink("s", link), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, dir+"/link", dir+"/file", dir+"/missing", dir+"/d*")
	for _, c := range []struct {
		path string
		want error
	}{
		{dir + "/missing", errdefs.ErrNotFound},
		{file, errdefs.ErrInvalidArgument},
		{path, errdefs.ErrPermissionDenied},
		{link, errdefs.ErrPermissionDenied}, // which leads to that one
	} {
		_, _, err := r.Add(t.Context(), Socket{Container: "c", Path: c.path})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.path, err, c.want)
		}
		if c.want == errdefs.ErrPermissionDenied && !strings.Contains(err.Error(), "runtime.allowed_sockets") {
			t.Errorf("the refusal does not name the key: %v", err)
		}
	}
	serve(t, dir+"/d1", echo)
	if _, _, err := r.Add(t.Context(), Socket{Container: "c", Path: dir + "/d1", CgroupsPath: "/../x"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad cgroupsPath: %v", err)
	}
	r.add(dir + "/d1")
	if err := r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Add(t.Context(), Socket{Container: "c", Path: dir + "/d1"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after Close: %v", err)
	}
}

// A container may begin before its server does.
func TestADeadSocketIsAdded(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	dead(t, path)
	guest, _ := r.add(path)
	if got, _ := ask(guest, "question"); got != "" {
		t.Errorf("a dead socket answers %q", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	serve(t, path, echo)
	if got, err := ask(guest, "question"); got != "question" || err != nil {
		t.Errorf("answer %q, %v", got, err)
	}
}

func TestAddAgainTakesTheNewMode(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, echo)
	guest, _ := r.add(path)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if again, _ := r.add(path); again != guest {
		t.Errorf("it is %s now, was %s", again, guest)
	}
	if info, err := os.Stat(guest); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// A socket whose user the host's keeps out resets, as that user's connect would fail.
func TestHostsPermissionCounts(t *testing.T) {
	r := newRig(t)
	path := hostPath(t)
	serve(t, path, echo)
	guest, _ := r.add(path)
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := ask(guest, "x"); got != "" {
		t.Errorf("answer %q", got)
	}
	if !strings.Contains(r.log.String(), "permission denied") {
		t.Errorf("logged: %s", r.log.String())
	}
}

func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/**", "/a", true},
		{"/**", "/a/b/c", true},
		{"/run/spire/*.sock", "/run/spire/agent.sock", true},
		{"/run/spire/*.sock", "/run/spire/x/agent.sock", false},
		{"/run/spire/*.sock", "/run/spire", false},
		{"/run/spire", "/run/spire/agent.sock", false},
		{"/run/**/agent.sock", "/run/agent.sock", true},
		{"/run/**/agent.sock", "/run/a/b/agent.sock", true},
		{"/run/**/agent.sock", "/run/a/b/other.sock", false},
		{"/a/**/b/**/c", "/a/x/b/y/b/c", true},
		{"/run/[ab].sock", "/run/b.sock", true},
		{"/run/[ab].sock", "/run/c.sock", false},
		{"/run/", "/run", true},
		{"/run/**x", "/run/y/x", false},
	} {
		if got := Allowed([]string{"/never", c.pattern}, c.path); got != c.want {
			t.Errorf("%s fits %s: %v", c.path, c.pattern, got)
		}
	}
	if Allowed(nil, "/a") {
		t.Error("no pattern allows")
	}
}

// FuzzEvent gives a table whatever a guest may report: it neither blocks nor serves
// what it does not know.
func FuzzEvent(f *testing.F) {
	for _, e := range []*agentv1.SocketEvent{{}, {SocketId: "s1", Connection: 1}, {SocketId: "s1"}, {SocketId: "s2", Connection: 1<<64 - 1}} {
		raw, err := proto.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var e agentv1.SocketEvent
		if proto.Unmarshal(raw, &e) != nil {
			return
		}
		table := New(Options{Log: slog.New(slog.DiscardHandler)})
		s := &socket{table: table, id: "s1", reported: make(chan report, maxReported)} // that is not served
		table.sockets["s1"] = s
		for range maxReported + 2 {
			table.Event(&e)
		}
		want := 0
		if e.GetSocketId() == "s1" && e.GetConnection() != 0 {
			want = maxReported
		}
		if len(s.reported) != want {
			t.Errorf("%v: %d are in the queue, want %d", &e, len(s.reported), want)
		}
	})
}
