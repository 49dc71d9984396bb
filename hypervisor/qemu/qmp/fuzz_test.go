package qmp

import (
	"bytes"
	"io"
	"net"
	"testing"
)

// A replayConn reads what the fuzzer wrote.
type replayConn struct {
	net.Conn
	io.Reader
}

func (c replayConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }
func (c replayConn) Close() error               { return nil }

// Whatever QEMU writes, the reader ends with a cause, keeps a bounded number of
// events, and every reply that it lets through decodes or is refused.
func FuzzClient(f *testing.F) {
	for _, seed := range []string{
		"",
		hello,
		hello + "\r\n" + `{"return": {}, "id": 1}`,
		hello + "\n" + `{"return": {"status": "running"}, "id": 2}` + "\n",
		hello + "\n" + `{"error": {"class": "GenericError", "desc": "no"}, "id": 2}` + "\n",
		hello + "\n" + `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {}}` + "\n",
		hello + "\n" + `{"return": {}, "id": 18446744073709551615}` + "\n",
		hello + "\n" + `{"return": {}, "id": 1}` + "\n" + `{"id": null}` + "\n",
		hello + "\n\x00\xff\n[[[[[",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		c, lines := newClient(replayConn{Reader: bytes.NewReader(in)})
		if err := c.greet(t.Context(), lines); err != nil {
			return
		}
		var replies []chan message
		for range 3 {
			_, reply, err := c.register()
			if err != nil {
				t.Fatal(err)
			}
			replies = append(replies, reply)
		}
		c.read(lines)
		if c.Err() == nil {
			t.Error("the connection ended without a cause")
		}
		n := 0
		for e := range c.Events() {
			if n++; len(e.Data) > maxEventData {
				t.Errorf("event with %d bytes of data", len(e.Data))
			}
		}
		if n > maxEvents {
			t.Errorf("%d events were kept", n)
		}
		for _, reply := range replies {
			select {
			case m := <-reply:
				var result struct{ Status string }
				if err := m.decode("query-status", &result); err != nil && len(err.Error()) > 3*maxText {
					t.Errorf("error of %d bytes", len(err.Error()))
				}
			default:
			}
		}
	})
}
