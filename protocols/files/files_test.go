package files

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// limit bounds every wait; only a broken test meets it.
const limit = 30 * time.Second

// carriers are the kinds of connection that the protocol is tested over: one that
// keeps what is written, and one on which each Write waits for its Reads and which
// has no half-close.
var carriers = map[string]func(testing.TB) (host, guest net.Conn){
	"socketpair": socketpair,
	"pipe":       func(testing.TB) (host, guest net.Conn) { return net.Pipe() },
}

// over runs a test on both ends of each kind of connection.
func over(t *testing.T, test func(t *testing.T, host, guest net.Conn)) {
	t.Helper()
	for name, connect := range carriers {
		t.Run(name, func(t *testing.T) {
			host, guest := connect(t)
			t.Cleanup(func() { host.Close(); guest.Close() })
			test(t, host, guest)
		})
	}
}

func socketpair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// begin runs the host's end, which closes its connection after, and yields the
// result.
func begin(host net.Conn, operation func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		err := operation()
		host.Close()
		done <- err
	}()
	return done
}

func result(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		t.Fatal("the host's end does not return")
		return nil
	}
}

func request(t *testing.T, guest net.Conn, want Request) {
	t.Helper()
	if got, err := ReadRequest(guest); err != nil || got != want {
		t.Fatalf("ReadRequest: %+v, %v, want %+v", got, err, want)
	}
}

var large = strings.Repeat("0123456789abcdef", 20000)

func TestBodiesOfTheHost(t *testing.T) {
	for name, want := range map[string]Request{
		"sync": {Op: OpSync, Path: "/copies/x"},
		"put":  {Op: OpPut, Container: "c", Path: "/in/../there"},
	} {
		t.Run(name, func(t *testing.T) {
			over(t, func(t *testing.T, host, guest net.Conn) {
				done := begin(host, func() error {
					if want.Op == OpPut {
						return Put(t.Context(), host, want.Container, want.Path, strings.NewReader(large))
					}
					return Sync(t.Context(), host, want.Path, func(w io.Writer) error {
						_, err := io.WriteString(w, large)
						return err
					})
				})
				request(t, guest, want)
				if b, err := io.ReadAll(NewBodyReader(guest)); string(b) != large || err != nil {
					t.Errorf("the body is %d bytes, %v", len(b), err)
				}
				if err := Answer(guest, nil); err != nil {
					t.Errorf("Answer: %v", err)
				}
				if err := result(t, done); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			})
		})
	}
}

func TestBodiesOfTheGuest(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		var got bytes.Buffer
		done := begin(host, func() error { return Get(t.Context(), host, "c", "/x", &got) })
		request(t, guest, Request{Op: OpGet, Container: "c", Path: "/x"})
		err := AnswerBody(guest, func(w io.Writer) error {
			for s := range strings.SplitAfterSeq(large, "f0") {
				io.WriteString(w, s)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		if err := result(t, done); err != nil || got.String() != large {
			t.Errorf("Get: %v, %d bytes", err, got.Len())
		}
	})
	over(t, func(t *testing.T, host, guest net.Conn) {
		var got []byte
		done := begin(host, func() (err error) {
			got, err = Read(t.Context(), host, "/copies/x", 5)
			return err
		})
		request(t, guest, Request{Op: OpRead, Path: "/copies/x", Max: 5})
		AnswerBody(guest, func(w io.Writer) error {
			_, err := io.WriteString(w, "hello")
			return err
		})
		if err := result(t, done); err != nil || string(got) != "hello" {
			t.Errorf("Read: %q, %v", got, err)
		}
	})
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := begin(host, func() error { return Get(t.Context(), host, "c", "/x", io.Discard) })
		request(t, guest, Request{Op: OpGet, Container: "c", Path: "/x"})
		AnswerBody(guest, func(w io.Writer) error {
			io.WriteString(w, large)
			return errdefs.ErrAborted
		})
		if err := result(t, done); !errdefs.IsAborted(err) {
			t.Errorf("Get of half: %v", err)
		}
	})
}

func TestNothingFollowsABody(t *testing.T) {
	body := NewBodyWriter(io.Discard)
	if err := body.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(body, "more"); err == nil || body.Close() == nil {
		t.Error("a body goes on after its end")
	}
}

func TestHostGoesAway(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		why := errors.New("no room")
		done := begin(host, func() error { return Get(t.Context(), host, "c", "/x", &capped{most: 1 << 20}) })
		request(t, guest, Request{Op: OpGet, Container: "c", Path: "/x"})
		err := AnswerBody(guest, func(w io.Writer) error {
			if _, err := io.Copy(w, endless{}); err == nil {
				t.Error("what has no end was written")
			}
			return why
		})
		if err == nil {
			t.Error("AnswerBody to a host that is gone: no error")
		}
		if err := result(t, done); !errors.Is(err, ErrHandshake) { // capped's
			t.Errorf("Get: %v", err)
		}
	})
}

func TestGuestSendsMoreThanWasAskedFor(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := begin(host, func() error {
			_, err := Read(t.Context(), host, "/copies/x", 5)
			return err
		})
		request(t, guest, Request{Op: OpRead, Path: "/copies/x", Max: 5})
		body := NewBodyWriter(guest)
		for {
			if _, err := body.Write([]byte("hello hello")); err != nil {
				break
			}
		}
		if err := result(t, done); !errors.Is(err, ErrHandshake) {
			t.Errorf("Read: %v", err)
		}
	})
}

func TestErrorsCross(t *testing.T) {
	long := strings.Repeat("ö", 2*maxText)
	for _, c := range []struct {
		answer error
		class  error
		text   string
	}{
		{fmt.Errorf("no room: %w", errdefs.ErrResourceExhausted), errdefs.ErrResourceExhausted, "no room: resource exhausted"},
		{fmt.Errorf("%w: %w", errdefs.ErrNotFound, io.EOF), errdefs.ErrNotFound, "not found: EOF"},
		{errors.New("no class"), errdefs.ErrUnknown, "no class"},
		{errors.New("two\nlines\x1b[2J\xff"), errdefs.ErrUnknown, "two lines [2J "},
		{errors.New(""), errdefs.ErrUnknown, "unknown"},
		{errors.New(long), errdefs.ErrUnknown, long[:maxText]},
	} {
		over(t, func(t *testing.T, host, guest net.Conn) {
			done := begin(host, func() error { return Drop(t.Context(), host, "/copies/x") })
			request(t, guest, Request{Op: OpDrop, Path: "/copies/x"})
			if err := Answer(guest, c.answer); err != nil {
				t.Errorf("Answer: %v", err)
			}
			if err := result(t, done); !errors.Is(err, c.class) || err.Error() != c.text {
				t.Errorf("%q became %v", c.answer, err)
			}
		})
	}
}

// The guest gives up while the host has the most to say still.
func TestGuestAnswersBeforeTheEnd(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := begin(host, func() error { return Put(t.Context(), host, "c", "/x", endless{}) })
		request(t, guest, Request{Op: OpPut, Container: "c", Path: "/x"})
		io.ReadFull(guest, make([]byte, 1000))
		if err := Answer(guest, errdefs.ErrResourceExhausted); err != nil {
			t.Errorf("Answer: %v", err)
		}
		if err := result(t, done); !errdefs.IsResourceExhausted(err) {
			t.Errorf("Put: %v", err)
		}
	})
	over(t, func(t *testing.T, host, guest net.Conn) {
		done := begin(host, func() error { return Put(t.Context(), host, "c", "/x", endless{}) })
		request(t, guest, Request{Op: OpPut, Container: "c", Path: "/x"})
		Answer(guest, nil)
		if err := result(t, done); !errors.Is(err, ErrHandshake) {
			t.Errorf("done without an end: %v", err)
		}
	})
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestHostBreaksOff(t *testing.T) {
	over(t, func(t *testing.T, host, guest net.Conn) {
		why := errors.New("the source is gone")
		done := begin(host, func() error {
			return Sync(t.Context(), host, "/copies/x", func(w io.Writer) error {
				io.WriteString(w, large)
				return why
			})
		})
		request(t, guest, Request{Op: OpSync, Path: "/copies/x"})
		if _, err := io.Copy(io.Discard, NewBodyReader(guest)); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("the guest reads %v", err)
		}
		if err := result(t, done); !errors.Is(err, why) {
			t.Errorf("Sync: %v", err)
		}
	})
}

func TestGuestGoesAway(t *testing.T) {
	operations := map[string]func(ctx context.Context, host net.Conn) error{
		"sync": func(ctx context.Context, host net.Conn) error {
			return Sync(ctx, host, "/x", func(w io.Writer) error { _, err := io.Copy(w, endless{}); return err })
		},
		"put": func(ctx context.Context, host net.Conn) error { return Put(ctx, host, "c", "/x", endless{}) },
		"get": func(ctx context.Context, host net.Conn) error { return Get(ctx, host, "c", "/x", io.Discard) },
		"read": func(ctx context.Context, host net.Conn) error {
			_, err := Read(ctx, host, "/x", 1)
			return err
		},
		"drop": func(ctx context.Context, host net.Conn) error { return Drop(ctx, host, "/x") },
	}
	for name, operation := range operations {
		t.Run(name, func(t *testing.T) {
			over(t, func(t *testing.T, host, guest net.Conn) {
				done := begin(host, func() error { return operation(t.Context(), host) })
				if _, err := ReadRequest(guest); err != nil {
					t.Fatal(err)
				}
				guest.Close()
				if err := result(t, done); err == nil || errors.Is(err, context.Canceled) {
					t.Errorf("%s: %v", name, err)
				}
			})
			// It answers nothing, and reads nothing.
			over(t, func(t *testing.T, host, _ net.Conn) {
				why := errors.New("given up")
				ctx, cancel := context.WithCancelCause(t.Context())
				done := begin(host, func() error { return operation(ctx, host) })
				cancel(why)
				if err := result(t, done); !errors.Is(err, why) {
					t.Errorf("%s: %v, want %v", name, err, why)
				}
			})
		})
	}
}

var requests = []Request{
	{Op: OpSync, Path: "/run/copies/x"},
	{Op: OpRead, Path: "/x", Max: MaxRead},
	{Op: OpDrop, Path: "/" + strings.Repeat("x", MaxPath-1)},
	{Op: OpPut, Container: strings.Repeat("c", maxID), Path: "/"},
	{Op: OpGet, Container: "a.b-c_D", Path: "/a/../b/"},
}

func TestValidate(t *testing.T) {
	for _, r := range requests {
		if err := r.Validate(); err != nil {
			t.Error(err)
		}
	}
	for _, r := range []Request{
		{},
		{Op: 6, Path: "/x"},
		{Op: OpSync},
		{Op: OpSync, Path: "x"},
		{Op: OpSync, Path: "/"},
		{Op: OpSync, Path: "/x/"},
		{Op: OpSync, Path: "/x/../y"},
		{Op: OpSync, Path: "/x\x00"},
		{Op: OpSync, Path: "/x", Max: 1},
		{Op: OpSync, Path: "/x", Container: "c"},
		{Op: OpSync, Path: "/" + strings.Repeat("x", MaxPath)},
		{Op: OpRead, Path: "/x"},
		{Op: OpRead, Path: "/x", Max: -1},
		{Op: OpRead, Path: "/x", Max: MaxRead + 1},
		{Op: OpPut, Path: "/x"},
		{Op: OpPut, Path: "/x", Container: ".."},
		{Op: OpPut, Path: "/x", Container: "a/b"},
		{Op: OpGet, Path: "x", Container: "c"},
		{Op: OpGet, Path: "/x", Container: strings.Repeat("c", maxID+1)},
	} {
		if err := r.Validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	host, _ := net.Pipe()
	if err := Drop(t.Context(), host, "relative"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Drop: %v", err)
	}
	if err := Get(t.Context(), host, "", "/x", io.Discard); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Get: %v", err)
	}
}

func TestHeader(t *testing.T) {
	for mode, want := range map[uint32]byte{
		unix.S_IFDIR: tar.TypeDir, unix.S_IFREG: tar.TypeReg, unix.S_IFLNK: tar.TypeSymlink,
		unix.S_IFIFO: tar.TypeFifo, unix.S_IFCHR: tar.TypeChar, unix.S_IFBLK: tar.TypeBlock,
	} {
		st := &unix.Stat_t{Mode: mode | 0o4751, Uid: 1<<32 - 2, Gid: 7, Size: 9, Rdev: unix.Mkdev(300, 70000), Mtim: unix.Timespec{Sec: 1, Nsec: 999}}
		h, err := Header("name", st)
		if err != nil || h.Typeflag != want || h.Mode != 0o4751 || h.Uid != 1<<32-2 || h.Gid != 7 || h.ModTime.UnixNano() != 1e9+999 {
			t.Errorf("%#o: %+v, %v", mode, h, err)
		}
		if device := want == tar.TypeChar || want == tar.TypeBlock; device != (h.Devmajor == 300 && h.Devminor == 70000) {
			t.Errorf("%#o: device %d:%d", mode, h.Devmajor, h.Devminor)
		}
		if (want == tar.TypeReg) != (h.Size == 9) {
			t.Errorf("%#o: size %d", mode, h.Size)
		}
		if err := tar.NewWriter(io.Discard).WriteHeader(h); err != nil {
			t.Errorf("%#o: %v", mode, err)
		}
	}
	if _, err := Header("name", &unix.Stat_t{Mode: unix.S_IFSOCK}); err == nil {
		t.Error("a socket has a header")
	}
}

// FuzzReadRequest feeds what a peer may send, in reads as short as they can be: a
// request is valid, is the one that was sent, and what follows it is left.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte(magic))
	for _, r := range requests {
		f.Add(append(appendRequest(nil, r), "body"...))
	}
	f.Add([]byte("HSKC\x04\xff" + large[:300]))
	f.Add([]byte("HSKC\x01\x00\xff\xff" + large))
	f.Fuzz(func(t *testing.T, sent []byte) {
		rest := bytes.NewReader(sent)
		r, err := readRequest(iotest.OneByteReader(rest))
		if err != nil {
			return
		}
		if err := r.Validate(); err != nil {
			t.Error(err)
		}
		if again := appendRequest(nil, r); !bytes.HasPrefix(sent, again) || rest.Len() != len(sent)-len(again) {
			t.Errorf("%q: %v, %d bytes left", sent, r, rest.Len())
		}
	})
}

// FuzzAnswer feeds the host's end whatever a guest may answer: only three zeros are a
// yes, and a no is one printable line of bounded length with a class.
func FuzzAnswer(f *testing.F) {
	for _, answer := range []string{"", "\x00\x00\x00", "\x00\x00\x01x", "\x0c\x00\x00", "\x03\x00\x04gone", "\x03\xff\xff", "\x01\x00\x03\x1b\n\xff"} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		err := Drop(t.Context(), readerConn{Reader: bytes.NewReader(answer), Writer: io.Discard}, "/x")
		if yes := bytes.HasPrefix(answer, []byte{0, 0, 0}); yes != (err == nil) {
			t.Fatalf("%q: %v", answer, err)
		}
		if err != nil && (len(err.Error()) > maxText+100 || strings.ContainsAny(err.Error(), "\n\x1b") || err.Error() == "") {
			t.Errorf("%q: %q", answer, err)
		}
	})
}

// FuzzBody feeds the body of a peer: what is read is what the frames hold, and only
// an empty frame is the end.
func FuzzBody(f *testing.F) {
	f.Add([]byte("\x00\x00"), uint8(1))
	f.Add([]byte("\x00\x05hello\x00\x00rest"), uint8(3))
	f.Add([]byte("\x00\x05hel"), uint8(3))
	f.Add(append([]byte("\xff\xff"), make([]byte, 1<<16)...), uint8(255))
	f.Fuzz(func(t *testing.T, sent []byte, size uint8) {
		var want []byte
		rest, whole := sent, false
		for len(rest) >= 2 && !whole {
			n := int(rest[0])<<8 | int(rest[1])
			rest = rest[2:]
			whole = n == 0
			n = min(n, len(rest))
			want = append(want, rest[:n]...)
			rest = rest[n:]
		}
		body := NewBodyReader(bytes.NewReader(sent))
		var got []byte
		p := make([]byte, int(size)+1)
		for {
			n, err := body.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				if whole != errors.Is(err, io.EOF) || whole == errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("whole %t: %v", whole, err)
				}
				break
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", sent, got, want)
		}
	})
}

// FuzzGet feeds the host's end of Get and Read whatever a guest may send.
func FuzzGet(f *testing.F) {
	f.Add([]byte("\x00\x05hello\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x06hello!\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x05hello\x00\x00\x03\x00\x04gone"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		var b bytes.Buffer
		err := Get(t.Context(), readerConn{Reader: bytes.NewReader(sent), Writer: io.Discard}, "c", "/x", &b)
		got, rerr := Read(t.Context(), readerConn{Reader: bytes.NewReader(sent), Writer: io.Discard}, "/x", 5)
		if b.Len() > len(sent) || len(got) > 5 {
			t.Errorf("%q: got %d and %d bytes", sent, b.Len(), len(got))
		}
		if same := b.Len() <= 5; same && (err == nil) != (rerr == nil) || rerr == nil && b.String() != string(got) {
			t.Errorf("%q: %q, %v; %q, %v", sent, b.String(), err, got, rerr)
		}
	})
}

// readerConn is a connection to a peer that has said all it says.
type readerConn struct {
	net.Conn // nil
	io.Reader
	io.Writer
}

func (c readerConn) Read(b []byte) (int, error)       { return c.Reader.Read(b) }
func (c readerConn) Write(b []byte) (int, error)      { return c.Writer.Write(b) }
func (c readerConn) SetDeadline(time.Time) error      { return nil }
func (c readerConn) SetReadDeadline(time.Time) error  { return nil }
func (c readerConn) SetWriteDeadline(time.Time) error { return nil }
