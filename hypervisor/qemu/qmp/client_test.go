package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}`
	// timeout is far above what anything here takes.
	timeout = 20 * time.Second
)

func wait(t *testing.T, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(timeout):
		t.Fatal("timed out")
	}
}

func TestNewRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ send, want string }{
		"no greeting":        {"", "closed the connection"},
		"half a greeting":    {`{"QMP": {`, "unexpected end"},
		"not a greeting":     {"{\"return\": {}, \"id\": \x1b1}\n", "invalid character"},
		"another object":     {`{"event": "RESUME"}` + "\n", `not a greeting: {"event": "RESUME"}`},
		"an endless line":    {strings.Repeat("x", maxLine+1), "above 1048576 bytes"},
		"end after greeting": {hello + "\n", "negotiate qmp"},
	} {
		t.Run(name, func(t *testing.T) {
			f, conn := newFake(t)
			go func() {
				_, _ = io.WriteString(f.conn, tt.send) // cut short when the client has seen enough
				_ = f.conn.CloseWrite()
			}()
			c, err := New(t.Context(), conn)
			if err == nil {
				c.Close()
				t.Fatal("New succeeded")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %q, want it to hold %q", err, tt.want)
			}
		})
	}
	t.Run("capabilities denied", func(t *testing.T) {
		f, conn := newFake(t)
		go func() {
			f.send(hello)
			f.receive()
			f.send(`{"error": {"class": "CommandNotFound", "desc": "no"}, "id": 1}`)
		}()
		const want = "negotiate qmp: qmp qmp_capabilities: no (CommandNotFound)"
		if _, err := New(t.Context(), conn); err == nil || err.Error() != want {
			t.Errorf("error = %v, want %s", err, want)
		}
	})
	t.Run("ctx ends", func(t *testing.T) {
		_, conn := newFake(t)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Millisecond, cancel)
		if _, err := New(ctx, conn); !errors.Is(err, context.Canceled) {
			t.Errorf("error = %v, want context.Canceled", err)
		}
	})
}

func TestExecute(t *testing.T) {
	for name, tt := range map[string]struct {
		args  any
		sent  string
		reply []string
		want  string
		err   string
		is    error
	}{
		"value":         {reply: []string{`{"return": {"status": "running"}, "id": 2}`}, want: "running"},
		"arguments":     {args: map[string]int{"a": 1}, sent: `{"a":1}`, reply: []string{`{"return": {"status": "x"}, "id": 2}`}, want: "x"},
		"after events":  {reply: []string{`{"event": "STOP"}`, `{"event": "RESUME"}`, `{"return": {"status": "y"}, "id": 2}`}, want: "y"},
		"generic error": {reply: []string{`{"error": {"class": "GenericError", "desc": "no \u001b[2J"}, "id": 2}`}, err: "qmp query: no  [2J"},
		"not found":     {reply: []string{`{"error": {"class": "DeviceNotFound", "desc": "no 'x'"}, "id": 2}`}, err: "qmp query: no 'x' (DeviceNotFound)", is: errdefs.ErrNotFound},
		"not known":     {reply: []string{`{"error": {"class": "CommandNotFound", "desc": "what"}, "id": 2}`}, err: "qmp query: what (CommandNotFound)", is: errdefs.ErrNotImplemented},
		"other type":    {reply: []string{`{"return": [], "id": 2}`}, err: "qmp query: decode the reply: json: cannot unmarshal array"},
		"bad arguments": {args: func() {}, err: "qmp query: encode arguments"},
	} {
		t.Run(name, func(t *testing.T) {
			c, f := connect(t)
			if tt.reply != nil {
				go func() {
					if got := f.receive(); string(got.Arguments) != tt.sent {
						t.Errorf("arguments = %s, want %s", got.Arguments, tt.sent)
					}
					f.send(tt.reply...)
				}()
			}
			var got struct{ Status string }
			err := c.Execute(t.Context(), "query", tt.args, &got)
			if got.Status != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.HasPrefix(err.Error(), tt.err) {
				t.Errorf("Execute = %q, %v; want %q, %q", got.Status, err, tt.want, tt.err)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v is no %v", err, tt.is)
			}
		})
	}
}

func TestRepliesOutOfOrder(t *testing.T) {
	c, f := connect(t)
	if got := c.Version(); got != "7.2.22" {
		t.Errorf("Version = %q", got)
	}
	const n = 20
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() {
			var got string
			err := c.Execute(t.Context(), "echo", map[string]string{"v": fmt.Sprint(i)}, &got)
			if err != nil || got != fmt.Sprint(i) {
				t.Errorf("call %d = %q, %v", i, got, err)
			}
		})
	}
	replies := make([]string, n)
	for i := range replies {
		var args struct{ V string }
		cmd := f.receive()
		if err := json.Unmarshal(cmd.Arguments, &args); err != nil {
			t.Fatal(err)
		}
		replies[n-1-i] = fmt.Sprintf(`{"return": %q, "id": %d}`, args.V, cmd.ID)
	}
	f.send(replies...)
	calls.Wait()
}

func TestEvents(t *testing.T) {
	c, f := connect(t)
	f.send(
		`{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "SHUTDOWN", "data": {"guest": true}}`,
		`{"event": "STOP"}`,
	)
	e := <-c.Events()
	if e.Name != "SHUTDOWN" || string(e.Data) != `{"guest": true}` || !e.Time.Equal(time.Unix(1700000000, 5000)) {
		t.Errorf("first event = %+v", e)
	}
	if e = <-c.Events(); e.Name != "STOP" || e.Data != nil {
		t.Errorf("second event = %+v", e)
	}
	f.conn.Close()
	if e, ok := <-c.Events(); ok {
		t.Errorf("event %+v after the end", e)
	}
}

// Nobody takes events: replies come all the same, and the newest events stay.
func TestEventsNobodyTakes(t *testing.T) {
	c, f := connect(t)
	const n = maxEvents + 50
	go func() {
		cmd := f.receive()
		for i := range n {
			f.send(fmt.Sprintf(`{"event": "E%d"}`, i))
		}
		f.send(fmt.Sprintf(`{"return": {}, "id": %d}`, cmd.ID))
	}()
	if err := c.Execute(t.Context(), "query", nil, nil); err != nil {
		t.Fatal(err)
	}
	f.conn.Close()
	i, lost := n-maxEvents, uint64(0)
	for e := range c.Events() {
		if want := fmt.Sprintf("E%d", i); e.Name != want {
			t.Fatalf("event %q, want %q", e.Name, want)
		}
		lost = e.Lost
		i++
	}
	if i != n || lost != n-maxEvents {
		t.Errorf("events up to %d with %d lost, want %d with %d", i, lost, n, n-maxEvents)
	}
}

func TestConnectionEnds(t *testing.T) {
	for name, tt := range map[string]struct{ send, want string }{
		"drop":            {"", "QEMU closed the connection"},
		"garbage":         {"hello\n", "garbage"},
		"empty line":      {"\n", "garbage"},
		"no id":           {`{"return": {}}` + "\n", "neither an event nor the reply"},
		"id never given":  {`{"return": {}, "id": 99}` + "\n", "neither an event nor the reply"},
		"id of no number": {`{"return": {}, "id": "2"}` + "\n", "garbage"},
		"id and nothing":  {`{"id": 2}` + "\n", "neither an event nor the reply"},
		"both":            {`{"return": {}, "error": {}, "id": 2}` + "\n", "neither an event nor the reply"},
		"oversize line":   {strings.Repeat(" ", maxLine+1), "above 1048576 bytes"},
		"oversize event":  {`{"event": "E", "data": "` + strings.Repeat("x", maxEventData) + "\"}\n", "event from QEMU above"},
	} {
		t.Run(name, func(t *testing.T) {
			c, f := connect(t)
			var calls sync.WaitGroup
			for range 3 {
				calls.Go(func() {
					err := c.Execute(t.Context(), "query", nil, nil)
					if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("command in flight: %v, want %q", err, tt.want)
					}
				})
			}
			for range 3 {
				f.receive()
			}
			_, _ = io.WriteString(f.conn, tt.send)
			_ = f.conn.CloseWrite()
			calls.Wait()
			wait(t, c.Done())
			if err := c.Err(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Err = %v, want %q", err, tt.want)
			}
			if err := c.Execute(t.Context(), "query", nil, nil); !errdefs.IsUnavailable(err) {
				t.Errorf("command after the end: %v", err)
			}
		})
	}
}

func TestClose(t *testing.T) {
	c, f := connect(t)
	failed := make(chan error)
	go func() { failed <- c.Execute(t.Context(), "query", nil, nil) }()
	f.receive()
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-failed; !errdefs.IsUnavailable(err) {
		t.Errorf("command in flight: %v", err)
	}
	if err := c.Err(); err != nil {
		t.Errorf("Err after Close = %v", err)
	}
}

// The reply to a command that was given up harms no other.
func TestContextEndsBeforeReply(t *testing.T) {
	c, f := connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() { failed <- c.Execute(ctx, "slow", nil, nil) }()
	late := f.receive()
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want context.Canceled", err)
	}
	go func() {
		next := f.receive()
		f.send(fmt.Sprintf(`{"return": "late", "id": %d}`, late.ID), fmt.Sprintf(`{"return": "next", "id": %d}`, next.ID))
	}()
	var got string
	if err := c.Execute(t.Context(), "next", nil, &got); err != nil || got != "next" {
		t.Errorf("next command = %q, %v", got, err)
	}
}

// A server that reads nothing cannot hold a caller beyond its ctx.
func TestContextEndsInWrite(t *testing.T) {
	c, f := connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = f.in.ReadByte()
		cancel()
	}()
	big := map[string]string{"v": strings.Repeat("x", 8<<20)}
	if err := c.Execute(ctx, "big", big, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want context.Canceled", err)
	}
	wait(t, c.Done()) // half a line was sent
}

func TestExecuteFile(t *testing.T) {
	c, f := connect(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		line, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := f.conn.ReadMsgUnix(line, oob)
		if err != nil {
			t.Error(err)
			return
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			t.Errorf("control messages = %v, %v", messages, err)
			return
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			t.Errorf("descriptors = %v, %v", fds, err)
			return
		}
		got := os.NewFile(uintptr(fds[0]), "passed")
		defer got.Close()
		_, _ = io.WriteString(got, "through")
		if want := `{"execute":"getfd","arguments":{"fdname":"x"},"id":2}` + "\n"; string(line[:n]) != want {
			t.Errorf("line = %q, want %q", line[:n], want)
		}
		f.send(`{"return": {}, "id": 2}`)
	}()
	if err := c.ExecuteFile(t.Context(), "getfd", map[string]string{"fdname": "x"}, nil, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != "through" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestExecuteFileNeedsUnixSocket(t *testing.T) {
	conn, peer := net.Pipe()
	defer peer.Close()
	c := &Client{conn: conn}
	if err := c.ExecuteFile(t.Context(), "getfd", nil, nil, os.Stdin); !errdefs.IsInvalidArgument(err) {
		t.Errorf("error = %v", err)
	}
}
