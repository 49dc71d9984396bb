package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/husk-containers/husk/test/rig/job"
)

func newMachine() *machine {
	return &machine{
		ends:       make(chan end),
		traffic:    make(chan traffic),
		result:     make(chan job.Result, 1),
		consoleEnd: make(chan struct{}),
		done:       make(chan struct{}),
	}
}

// attach gives the machine one of its connections and returns the guest's end.
func (m *machine) attach(use func(net.Conn)) net.Conn {
	host, guest := net.Pipe()
	m.hostEnds = append(m.hostEnds, host)
	go use(host)
	return guest
}

func TestFollowWaitsForAllOutput(t *testing.T) {
	m := newMachine()
	defer m.stop()
	var stdout, stderr bytes.Buffer
	relayOut, relayErr := m.relay(job.OutPort, &stdout), m.relay(job.ErrPort, &stderr)
	out := m.attach(func(c net.Conn) { relayOut(c) })
	errs := m.attach(func(c net.Conn) { relayErr(c) })
	result := m.attach(func(c net.Conn) { m.readResult(c) })
	go func() {
		// The result overtakes the output, as it may on ports of their own.
		json.NewEncoder(result).Encode(job.Result{Code: 7, Stdout: 6, Stderr: 3})
		out.Write([]byte("abc"))
		errs.Write([]byte("xyz"))
		out.Write([]byte("def"))
	}()
	code, err := m.follow(t.Context())
	if code != 7 || err != nil {
		t.Fatalf("code %d, error %v, want 7 and none", code, err)
	}
	if stdout.String() != "abcdef" || stderr.String() != "xyz" {
		t.Errorf("stdout %q, stderr %q", &stdout, &stderr)
	}
}

func TestFollowReportsTheMachinesEnd(t *testing.T) {
	m := newMachine()
	defer m.stop()
	console := m.attach(func(c net.Conn) { m.watchConsole(c) })
	go func() {
		m.ends <- end{name: "virtiofsd", clean: true, err: errors.New("exit status 0")}
		m.ends <- end{name: qemuName, clean: true, err: errors.New("exit status 0")}
	}()
	go func() {
		console.Write([]byte("booting\r\n\x1b[1mKernel panic\r\n"))
		console.Close()
	}()
	_, err := m.follow(t.Context())
	const want = "run machine: qemu-system-x86_64 ended before the command: exit status 0\n  | booting\n  | [1mKernel panic"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestFollowEndsWithItsContext(t *testing.T) {
	m := newMachine()
	defer m.stop()
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := m.follow(ctx); !errors.Is(err, cause) {
		t.Errorf("error %v, want %v", err, cause)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestFollowReportsAWriterThatFails(t *testing.T) {
	m := newMachine()
	defer m.stop()
	relay := m.relay(job.OutPort, brokenWriter{})
	out := m.attach(func(c net.Conn) { relay(c) })
	go out.Write([]byte("abc"))
	if _, err := m.follow(t.Context()); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("error %v, want the writer's", err)
	}
}

func TestTail(t *testing.T) {
	var long tail
	for range 10_000 {
		long.Write([]byte("a line\n"))
	}
	if len(long.buf) > tailBytes {
		t.Errorf("keeps %d bytes, want at most %d", len(long.buf), tailBytes)
	}
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"\n \r\n", ""},
		{"one\ntwo\nthree", "\n  | two\n  | three"},
		{"a\x00b\x1b\xffc\n", "\n  | abc"},
	} {
		var got tail
		got.Write([]byte(test.in))
		if got := got.quote(2); got != test.want {
			t.Errorf("quote of %q: %q, want %q", test.in, got, test.want)
		}
	}
}
