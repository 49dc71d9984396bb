package stream

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// pair returns the two ends of a connection.
func pair(t testing.TB) (guest, host *net.UnixConn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "conn"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); g.Close() })
	return g.(*net.UnixConn), c.(*net.UnixConn)
}

// start returns a Copier for stdin and stdout of a process that the test plays
// by child, and the host's ends.
func start(t testing.TB) (k *Copier, child Files, stdin, stdout *net.UnixConn) {
	t.Helper()
	var conns Conns
	conns.Stdin, stdin = pair(t)
	conns.Stdout, stdout = pair(t)
	child, local, err := Pipes(conns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(child.Close)
	k = Copy(local, conns, false)
	t.Cleanup(k.Close)
	return k, child, stdin, stdout
}

func TestStdinEOF(t *testing.T) {
	_, child, stdin, _ := start(t)
	io.WriteString(stdin, "hello")
	stdin.CloseWrite()
	if b, err := io.ReadAll(child.Stdin); string(b) != "hello" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestStdoutEOF(t *testing.T) {
	_, child, _, stdout := start(t)
	io.WriteString(child.Stdout, "hello")
	child.Stdout.Close()
	if b, err := io.ReadAll(stdout); string(b) != "hello" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestDrainCountsWhatWasWritten(t *testing.T) {
	for range 50 { // the copier may stand anywhere when the process ends
		k, child, _, stdout := start(t)
		var got bytes.Buffer
		var reading sync.WaitGroup
		reading.Go(func() { io.Copy(&got, stdout) })
		want := bytes.Repeat([]byte("x"), 200000)
		child.Stdout.Write(want)
		out, errs := k.Drain(time.Minute) // with the other end of the pipe open
		if out != uint64(len(want)) || errs != 0 {
			t.Fatalf("%d and %d bytes, want %d and 0", out, errs, len(want))
		}
		io.WriteString(child.Stdout, "late")
		child.Stdout.Close()
		if reading.Wait(); got.Len() != len(want)+4 {
			t.Fatalf("%d bytes read, want %d", got.Len(), len(want)+4)
		}
	}
}

func TestDrainGivesUpOnHostThatDoesNotRead(t *testing.T) {
	k, child, _, _ := start(t)
	n, chunk := 0, make([]byte, 64<<10)
	for {
		child.Stdout.SetWriteDeadline(time.Now().Add(250 * time.Millisecond))
		more, err := child.Stdout.Write(chunk)
		n += more
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil || n > 64<<20 {
			t.Fatalf("no back-pressure: %d bytes, %v", n, err)
		}
	}
	if out, _ := k.Drain(10 * time.Millisecond); out >= uint64(n) {
		t.Errorf("%d bytes drained of %d", out, n)
	}
	k.Close() // does not hang
}

func TestHostGoneClosesPipe(t *testing.T) {
	_, child, _, stdout := start(t)
	stdout.Close()
	for {
		if _, err := child.Stdout.Write(make([]byte, 4096)); err != nil {
			if !errors.Is(err, syscall.EPIPE) {
				t.Fatal(err)
			}
			return
		}
	}
}

func TestCloseEndsEverything(t *testing.T) {
	k, child, stdin, stdout := start(t)
	k.Close()
	if _, err := stdin.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("stdin connection: %v", err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("stdout connection: %v", err)
	}
	if _, err := child.Stdin.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("stdin: %v", err)
	}
}

func TestNoStreams(t *testing.T) {
	child, local, err := Pipes(Conns{})
	if err != nil || child != (Files{}) {
		t.Fatal(child, err)
	}
	k := Copy(local, Conns{}, false)
	if out, errs := k.Drain(time.Minute); out != 0 || errs != 0 {
		t.Error(out, errs)
	}
	k.Close()
}

func BenchmarkStdout(b *testing.B) {
	_, child, _, stdout := start(b)
	go io.Copy(struct{ io.Writer }{io.Discard}, stdout)
	chunk := make([]byte, 64<<10)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := child.Stdout.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
}
