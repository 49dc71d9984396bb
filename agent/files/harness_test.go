package files

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/portmux"
	"github.com/husk-containers/husk/protocols/files"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// A carrier is a listener to which a test dials.
type carrier interface {
	net.Listener
	dial() (net.Conn, error)
}

// A pipes carrier has no buffer and no half-close.
type pipes struct {
	conns chan net.Conn
	ended chan struct{}
	once  sync.Once
}

func newPipes(testing.TB) carrier {
	return &pipes{conns: make(chan net.Conn), ended: make(chan struct{})}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.ended) })
	return nil
}

func (p *pipes) Addr() net.Addr { return nil }

func (p *pipes) dial() (net.Conn, error) {
	host, guest := net.Pipe()
	select {
	case p.conns <- guest:
		return host, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

type sockets struct {
	net.Listener
	path string
}

func newSockets(t testing.TB) carrier {
	t.Helper()
	path := filepath.Join(t.TempDir(), "channel")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return sockets{ln, path}
}

func (s sockets) dial() (net.Conn, error) { return net.Dial("unix", s.path) }

// A muxed carrier is as virtio-serial has it: the close of a peer looks as its
// half-close does.
type muxed struct {
	net.Listener // nil
	host, guest  *portmux.Mux
	ctx          context.Context
	close        context.CancelFunc
}

func newMuxed(t testing.TB) carrier {
	t.Helper()
	a, b := net.Pipe()
	m := &muxed{}
	var err error
	if m.host, err = portmux.New(a, true); err != nil {
		t.Fatal(err)
	}
	if m.guest, err = portmux.New(b, false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.host.Close()
		m.guest.Close()
	})
	m.ctx, m.close = context.WithCancel(context.Background())
	return m
}

func (m *muxed) Accept() (net.Conn, error) {
	_, conn, err := m.guest.Accept(m.ctx)
	return conn, err
}

func (m *muxed) Close() error {
	m.close()
	return nil
}

func (m *muxed) dial() (net.Conn, error) { return m.host.Dial(context.Background(), files.Port) }

var carriers = map[string]func(testing.TB) carrier{"pipe": newPipes, "socket": newSockets, "mux": newMuxed}

// over runs a test over each kind of carrier.
func over(t *testing.T, test func(t *testing.T, g *guest)) {
	t.Helper()
	for name, carrier := range carriers {
		t.Run(name, func(t *testing.T) { test(t, newGuest(t, carrier(t), 8)) })
	}
}

// A guest serves operations in a directory of this machine.
type guest struct {
	*testing.T
	ctx  context.Context
	dir  string
	ln   carrier
	pids map[string]int // of containers; 0 is one that does not run
	end  context.CancelFunc
	done chan error
}

func newGuest(t *testing.T, ln carrier, operations int) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	g := &guest{
		T: t, ctx: ctx, dir: filepath.Join(t.TempDir(), "copies"), ln: ln, end: cancel,
		pids: map[string]int{"c": os.Getpid(), "created": 0}, done: make(chan error, 1),
	}
	go func() { g.done <- newServer(g.dir, g, operations).serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := g.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return g
}

// InitPID implements Containers.
func (g *guest) InitPID(id string) (int, error) {
	pid, ok := g.pids[id]
	switch {
	case !ok:
		return 0, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	case pid == 0:
		return 0, errdefs.ErrFailedPrecondition
	}
	return pid, nil
}

// result returns what serve has, and leaves it for the clean-up.
func (g *guest) result() error {
	g.Helper()
	select {
	case err := <-g.done:
		g.done <- err
		return err
	case <-time.After(limit):
		g.Fatal("serve does not return")
		return nil
	}
}

// do runs an operation on a connection of its own.
func (g *guest) do(operation func(conn net.Conn) error) error {
	conn, err := g.ln.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return operation(conn)
}

// sync makes the copy called name what entries are.
func (g *guest) sync(name string, entries ...*tar.Header) error {
	return g.do(func(conn net.Conn) error {
		return files.Sync(g.ctx, conn, filepath.Join(g.dir, name), func(w io.Writer) error { return archiveOf(w, entries...) })
	})
}

func (g *guest) mustSync(name string, entries ...*tar.Header) {
	g.Helper()
	if err := g.sync(name, entries...); err != nil {
		g.Fatal(err)
	}
}

func (g *guest) put(container, path string, entries ...*tar.Header) error {
	var b strings.Builder
	if err := archiveOf(&b, entries...); err != nil {
		return err
	}
	return g.do(func(conn net.Conn) error {
		return files.Put(g.ctx, conn, container, path, strings.NewReader(b.String()))
	})
}

func (g *guest) path(name string) string { return filepath.Join(g.dir, name) }

func (g *guest) lstat(name string) (st unix.Stat_t) {
	g.Helper()
	if err := unix.Lstat(g.path(name), &st); err != nil {
		g.Fatalf("%s: %v", name, err)
	}
	return st
}

// When the entries of tests are from, to the nanosecond.
var when = time.Unix(1_700_000_000, 123_456_789)

// contentKey is the record in which a test's entry has its content.
const contentKey = "TEST.content"

func entryOf(kind byte, name string, mode int64) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: when, Uid: os.Getuid(), Gid: os.Getgid(), Format: tar.FormatPAX}
}

func dirEntry(name string) *tar.Header { return entryOf(tar.TypeDir, name, 0o755) }

func fileEntry(name, content string) *tar.Header {
	h := entryOf(tar.TypeReg, name, 0o644)
	h.Size, h.PAXRecords = int64(len(content)), map[string]string{contentKey: content}
	return h
}

func linkEntry(name, leads string) *tar.Header {
	h := entryOf(tar.TypeSymlink, name, 0o777)
	h.Linkname = leads
	return h
}

func hardEntry(name, to string) *tar.Header {
	h := entryOf(tar.TypeLink, name, 0o644)
	h.Linkname = to
	return h
}

// with changes an entry.
func with(h *tar.Header, change func(*tar.Header)) *tar.Header {
	change(h)
	return h
}

func archiveOf(w io.Writer, entries ...*tar.Header) error {
	tw := tar.NewWriter(w)
	for _, h := range entries {
		sent := *h
		content := h.PAXRecords[contentKey]
		sent.PAXRecords = make(map[string]string)
		for k, v := range h.PAXRecords {
			if k != contentKey {
				sent.PAXRecords[k] = v
			}
		}
		if err := tw.WriteHeader(&sent); err != nil {
			return err
		}
		if _, err := io.WriteString(tw, content); err != nil {
			return err
		}
	}
	return tw.Close()
}

// listing is what is below dir, one line for each name: type, mode, and content or
// where it leads.
func listing(t testing.TB, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		what := ""
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what = string(b)
		case info.Mode()&fs.ModeSymlink != 0:
			if what, err = os.Readlink(path); err != nil {
				return err
			}
		}
		fmt.Fprintf(&all, "%s %s %s\n", info.Mode(), name, what)
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all.String()
}

// until waits for cond.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
