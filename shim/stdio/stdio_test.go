package stdio

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The test binary is the logging driver where this is set for it by the URI.
const driverArg = "husk-test-driver"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == driverArg {
		driver(os.Args[2:])
		return
	}
	os.Exit(m.Run())
}

// driver copies its streams to the files that its arguments name.
func driver(args []string) {
	out, errOut, ready := os.NewFile(3, "stdout"), os.NewFile(4, "stderr"), os.NewFile(5, "ready")
	if args[0] == "die" {
		return
	}
	name := args[1]
	w, err := os.Create(name)
	if err != nil {
		return
	}
	fmt.Fprintf(w, "%s %s %q\n", os.Getenv("CONTAINER_ID"), os.Getenv("CONTAINER_NAMESPACE"), args[2:])
	ready.Write([]byte{1}) //nolint:errcheck // the shim sees it
	ready.Close()          //nolint:errcheck // likewise
	io.Copy(w, out)        //nolint:errcheck // the test sees it
	io.Copy(w, errOut)     //nolint:errcheck // likewise
	w.Close()              //nolint:errcheck // likewise
	os.Rename(name, name+".done")
}

func mkfifo(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, u URIs) *Streams {
	t.Helper()
	s, err := Open(t.Context(), u, Owner{ID: "c1", Namespace: "ns"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// reader opens a client's end of an output FIFO, which does not wait.
func reader(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() }) //nolint:errcheck // read only
	return f
}

func TestNone(t *testing.T) {
	s := open(t, URIs{})
	if s.Stdin != nil || s.Stdout != nil || s.Stderr != nil {
		t.Errorf("streams of nothing: %+v", s)
	}
	s.CloseStdin()
}

func TestStdinEndsAtCloseStdin(t *testing.T) {
	path := mkfifo(t, "in")
	s := open(t, URIs{Stdin: path})
	if err := s.OpenStdin(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	for _, word := range []string{"first", "again"} { // a client that detaches and comes back
		client, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.WriteString(word); err != nil {
			t.Fatal(err)
		}
		client.Close() //nolint:errcheck // written
		if n, err := s.Stdin.Read(buf); err != nil || string(buf[:n]) != word {
			t.Fatalf("read %q, %v, want %q", buf[:n], err, word)
		}
	}
	client, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.CloseStdin() // before the client has written and closed, as clients do
	if _, err := client.WriteString("last"); err != nil {
		t.Fatal(err)
	}
	client.Close() //nolint:errcheck // written
	if all, err := io.ReadAll(s.Stdin); err != nil || string(all) != "last" {
		t.Errorf("read %q, %v, want what was written and the end", all, err)
	}
}

// A client that has ended an empty input before the process starts.
func TestStdinClosedBeforeItIsOpened(t *testing.T) {
	s := open(t, URIs{Stdin: mkfifo(t, "in")})
	s.CloseStdin()
	if err := s.OpenStdin(); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Stdin.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d, %v, want the end", n, err)
	}
}

func TestCloseUnblocks(t *testing.T) {
	in, out := mkfifo(t, "in"), mkfifo(t, "out")
	reader(t, out)
	s := open(t, URIs{Stdin: in, Stdout: "fifo://" + out})
	unopened := open(t, URIs{Stdin: in})
	go unopened.Close()
	if _, err := unopened.Stdin.Read(make([]byte, 1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a read before OpenStdin ended with %v", err)
	}
	if err := s.OpenStdin(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() {
		_, err := s.Stdin.Read(make([]byte, 1))
		ended <- err
	}()
	go func() { // more than fits
		_, err := s.Stdout.Write(make([]byte, 4<<20))
		ended <- err
	}()
	s.Close()
	for range 2 {
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Errorf("a blocked call ended with %v", err)
		}
	}
	if err := errors.Join(s.Stdin.Close(), s.Stdout.Close()); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func TestOutputOutlivesItsReader(t *testing.T) {
	path := mkfifo(t, "out")
	first := reader(t, path)
	s := open(t, URIs{Stdout: path, Stderr: path, Terminal: true})
	if s.Stderr != nil {
		t.Error("a terminal has a stderr")
	}
	first.Close() //nolint:errcheck // read only
	if _, err := s.Stdout.Write([]byte("while detached")); err != nil {
		t.Fatalf("write without a reader: %v", err)
	}
	second := reader(t, path)
	if err := s.Stdout.Close(); err != nil {
		t.Fatal(err)
	}
	if all, err := io.ReadAll(second); err != nil || string(all) != "while detached" {
		t.Errorf("read %q, %v", all, err)
	}
}

func TestOpenWaitsForAReader(t *testing.T) {
	path := mkfifo(t, "out")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, URIs{Stdout: path}, Owner{}); err == nil {
		t.Error("opened a FIFO that nobody reads")
	}
}

func TestDrainWaitsForTheReader(t *testing.T) {
	path := mkfifo(t, "out")
	client := reader(t, path)
	s := open(t, URIs{Stdout: path})
	if _, err := s.Stdout.Write(make([]byte, 100<<10)); err != nil {
		t.Fatal(err)
	}
	s.Stdout.Close() //nolint:errcheck // written
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		drain(path, time.Hour)
	}()
	for range 100 {
		select {
		case <-drained:
			t.Fatal("drained before everything was read")
		default:
		}
		if _, err := io.ReadFull(client, make([]byte, 1<<10)); err != nil {
			t.Fatal(err)
		}
	}
	<-drained
	if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d, %v after the drain, want the end", n, err)
	}
}

func TestDrainGivesUp(t *testing.T) {
	path := mkfifo(t, "out")
	client := reader(t, path)
	s := open(t, URIs{Stdout: path})
	if _, err := s.Stdout.Write([]byte("nobody will read this")); err != nil {
		t.Fatal(err)
	}
	drain(path, time.Millisecond) // on a client that stopped reading
	s.Stdout.Close()              //nolint:errcheck // written
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		drain(path, time.Hour)
	}()
	client.Close() //nolint:errcheck // read only
	<-gone         // on a client that went away
	s.Drain()      // on nobody
}

func TestFileIsAppendedTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "logs", "c1.log")
	for range 2 {
		s := open(t, URIs{Stdout: "file://" + path, Stderr: "file://" + path})
		fmt.Fprintln(s.Stdout, "out")
		fmt.Fprintln(s.Stderr, "err")
		s.Close()
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "out\nerr\nout\nerr\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

func TestDriver(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"binary", "binary-v2"} {
		log := filepath.Join(t.TempDir(), "log")
		uri := fmt.Sprintf("%s://%s?%s=to&%s=a%%20b&c", scheme, self, driverArg, log)
		s := open(t, URIs{Stdout: uri, Stderr: uri})
		fmt.Fprint(s.Stdout, "out")
		fmt.Fprint(s.Stderr, "err")
		s.Close()
		want := `c1 ns ["a b" "c" ""]` + "\nouterr"
		if got := await(t, log+".done"); got != want {
			t.Errorf("%s: the driver got %q, want %q", scheme, got, want)
		}
	}
	uri := fmt.Sprintf("binary-v2://%s?%s=die", self, driverArg)
	if _, err := Open(t.Context(), URIs{Stdout: uri}, Owner{}); err == nil || !strings.Contains(err.Error(), "before it was ready") {
		t.Errorf("a driver that died: %v", err)
	}
	if _, err := Open(t.Context(), URIs{Stdout: "binary:///does/not/exist"}, Owner{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a driver that is missing: %v", err)
	}
}

// await waits for a file to be there and returns what it holds.
func await(t *testing.T, path string) string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd) //nolint:errcheck // read only
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	for {
		raw, err := os.ReadFile(path)
		if err == nil {
			return string(raw)
		}
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); err != nil || n == 0 {
			t.Fatalf("%s did not come: %v", path, err)
		}
		unix.Read(fd, make([]byte, 4096)) //nolint:errcheck // only a wake-up
	}
}

func TestRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		u  URIs
		is error
	}{
		{URIs{Stdout: "syslog://x"}, errdefs.ErrNotImplemented},
		{URIs{Stdout: "relative"}, errdefs.ErrInvalidArgument},
		{URIs{Stdin: "file://" + file}, errdefs.ErrInvalidArgument},
		{URIs{Stdin: file}, errdefs.ErrInvalidArgument},
		{URIs{Stderr: "binary:///bin/true"}, errdefs.ErrInvalidArgument},
		{URIs{Stdout: "binary:///bin/true?a=%zz"}, errdefs.ErrInvalidArgument},
		{URIs{Stdout: file + ".missing"}, os.ErrNotExist},
	} {
		if _, err := Open(t.Context(), tt.u, Owner{}); !errors.Is(err, tt.is) {
			t.Errorf("%+v: %v, want %v", tt.u, err, tt.is)
		}
	}
}

func TestAllBytesArrive(t *testing.T) {
	path := mkfifo(t, "out")
	client := reader(t, path)
	s := open(t, URIs{Stdout: path})
	sent := make(chan []byte, 1)
	go func() {
		sum := sha256.New()
		chunk := bytes.Repeat([]byte("0123456789abcdef"), 8<<10)
		for range 160 { // 20 MiB
			sum.Write(chunk)
			if _, err := s.Stdout.Write(chunk); err != nil {
				break
			}
		}
		s.Stdout.Close() //nolint:errcheck // written
		sent <- sum.Sum(nil)
	}()
	sum := sha256.New()
	if n, err := io.Copy(sum, client); err != nil || n != 20<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if want := <-sent; !bytes.Equal(sum.Sum(nil), want) {
		t.Error("other bytes than were written")
	}
}

func BenchmarkFIFO(b *testing.B) {
	path := filepath.Join(b.TempDir(), "out")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		b.Fatal(err)
	}
	client, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		b.Fatal(err)
	}
	s, err := Open(b.Context(), URIs{Stdout: path}, Owner{})
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{client}, make([]byte, 32<<10)) //nolint:errcheck // as clients read
	}()
	chunk := make([]byte, 128<<10)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := s.Stdout.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	s.Close()
	<-done
}
