package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/forward"
)

// insideHost in the environment tells the test binary that its network namespace
// is its own.
const insideHost = "HUSK_FORWARD_HOST"

// ownHost tells that this process has a network namespace of its own, of which a test
// may take any port; where it has none, it runs the test in one that has.
func ownHost(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideHost) != "" {
		if err := setUp(netns.None()); err != nil && !errors.Is(err, unix.EEXIST) {
			t.Fatal(err)
		}
		return true
	}
	needRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1", "-test.timeout=4m")
	cmd.Env = append(os.Environ(), insideHost+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func event(network, addr string, port uint32) *agentv1.ListenEvent {
	protocol := map[string]agentv1.ListenEvent_Protocol{"tcp": agentv1.ListenEvent_PROTOCOL_TCP, "udp": agentv1.ListenEvent_PROTOCOL_UDP}[network]
	return &agentv1.ListenEvent{Protocol: protocol, Address: addr, Port: port}
}

func closed(e *agentv1.ListenEvent) *agentv1.ListenEvent {
	e.Closed = true
	return e
}

func newHostPorts(t *testing.T, dial Dial, log *slog.Logger) *HostPorts {
	t.Helper()
	h := NewHostPorts(dial, []netip.Addr{podV4, podV6}, log)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// ask says hello to a service.
func ask(t *testing.T, network, addr string) (string, error) {
	t.Helper()
	conn, err := net.DialTimeout(network, addr, limit)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	if tcp, ok := conn.(*net.TCPConn); ok {
		return say(t, tcp, "hello"), nil
	}
	conn.Write([]byte("hello"))
	b := make([]byte, 1<<16)
	n, err := conn.Read(b)
	return string(b[:n]), err
}

func TestHostPortsReachTheGuest(t *testing.T) {
	if !ownHost(t) {
		return
	}
	h := newHostPorts(t, startGuest(t), newLog(t))
	for _, c := range []struct{ network, listen, dial, answer string }{
		{"tcp", "127.0.0.1", "127.0.0.1", "127.0.0.1:7 5 <nil>"},
		{"tcp", "::1", "[::1]", "[::1]:7 5 <nil>"},
		{"tcp", "10.99.0.5", "10.99.0.5", "10.99.0.5:7 5 <nil>"},
		// By another way than loopback, it does not come from loopback.
		{"tcp", "0.0.0.0", "10.99.0.5", "10.99.0.5:7 5 <nil>"},
		{"tcp", "0.0.0.0", "127.0.0.1", "127.0.0.1:7 5 <nil>"},
		{"tcp", "::", "[fd99::5]", "[fd99::5]:7 5 <nil>"},
		{"tcp", "::", "127.0.0.1", "127.0.0.1:7 5 <nil>"},
		{"udp", "127.0.0.1", "127.0.0.1", "127.0.0.1:7 hello"},
		{"udp", "0.0.0.0", "10.99.0.5", "10.99.0.5:7 hello"},
		{"udp", "::", "[fd99::5]", "[fd99::5]:7 hello"},
		{"udp", "::", "[::1]", "[::1]:7 hello"},
		{"udp", "::", "127.0.0.1", "127.0.0.1:7 hello"},
	} {
		e := event(c.network, c.listen, portEcho)
		h.Apply(e)
		h.Apply(e) // said twice is said once
		if got, err := ask(t, c.network, c.dial+":7"); got != c.answer || err != nil {
			t.Errorf("%s %s by %s: %q, %v, want %q", c.network, c.listen, c.dial, got, err, c.answer)
		}
		h.Apply(closed(e))
		h.Apply(closed(e))
		if _, err := ask(t, c.network, c.dial+":7"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s %s closed: %v, want refused", c.network, c.listen, err)
		}
	}
}

// A service that listens on 0.0.0.0 and on :: for IPv6 alone has both, whichever
// it opens or closes first.
func TestHostPortsOfBothFamilies(t *testing.T) {
	if !ownHost(t) {
		return
	}
	h := newHostPorts(t, startGuest(t), newLog(t))
	v4, v6 := event("tcp", "0.0.0.0", portEcho), event("tcp", "::", portEcho)
	check := func(when, want4, want6 string) {
		t.Helper()
		got4, _ := ask(t, "tcp", "127.0.0.1:7")
		got6, _ := ask(t, "tcp", "[::1]:7")
		if got4 != want4 || got6 != want6 {
			t.Errorf("%s: %q and %q, want %q and %q", when, got4, got6, want4, want6)
		}
	}
	const answer4, answer6 = "127.0.0.1:7 5 <nil>", "[::1]:7 5 <nil>"
	h.Apply(v6)
	check("::", answer4, answer6)
	h.Apply(v4)
	check("both", answer4, answer6)
	h.Apply(closed(event("tcp", "::", portEcho)))
	check("0.0.0.0", answer4, "")
	h.Apply(v6)
	h.Apply(closed(event("tcp", "0.0.0.0", portEcho)))
	check("again ::", answer4, answer6)
	h.Apply(closed(event("tcp", "::", portEcho)))
	check("none", "", "")
}

// The guest is hostile: it cannot take more than it may, nor log without end.
func TestHostPortsOfAHostileGuest(t *testing.T) {
	if !ownHost(t) {
		return
	}
	var log bytes.Buffer
	h := newHostPorts(t, func(context.Context, uint32) (net.Conn, error) { return nil, errors.New("no guest") },
		slog.New(slog.NewTextHandler(&log, nil)))
	inUse, err := net.Listen("tcp4", "127.0.0.1:9999")
	if err != nil {
		t.Fatal(err)
	}
	defer inUse.Close()
	for range 10 {
		h.Apply(event("tcp", "127.0.0.1", 9999))
		h.Apply(closed(event("tcp", "127.0.0.1", 9999)))
	}
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `port="tcp 127.0.0.1:9999" err="it is in use on the host"`) {
		t.Errorf("log of a port in use:\n%s", got)
	}
	log.Reset()
	fds := descriptors(t)
	for _, e := range []*agentv1.ListenEvent{
		{},
		nil, event("tcp", "", 1), event("tcp", "1.2.3", 1), event("tcp", "fe80::1%lo", 1), event("tcp", "224.0.0.1", 1),
		event("tcp", "127.0.0.1", 0), event("tcp", "127.0.0.1", 65536), event("sctp", "127.0.0.1", 1),
		{Protocol: 99, Address: "127.0.0.1", Port: 1},
		closed(event("tcp", "127.0.0.1", 1)),
		event("tcp", "192.0.2.1", 1), // not the host's
	} {
		h.Apply(e)
	}
	if got := descriptors(t); got != fds {
		t.Errorf("%d descriptors, %d before", got, fds)
	}
	h.Apply(closed(event("tcp", "192.0.2.1", 1)))
	for port := range uint32(5000) {
		h.Apply(event("tcp", "127.0.0.1", 10000+port))
	}
	if got := descriptors(t); got > fds+maxListeners {
		t.Errorf("%d descriptors for listeners, want at most %d", got-fds, maxListeners)
	}
	if n := strings.Count(log.String(), "\n"); n > maxWarnings {
		t.Errorf("%d lines of log", n)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	h.Apply(event("tcp", "127.0.0.1", 4000))
	settles(t, "descriptors", func() int { return descriptors(t) }, fds)
}

func TestHostPortsRefusedInTheGuest(t *testing.T) {
	if !ownHost(t) {
		return
	}
	h := newHostPorts(t, startGuest(t), newLog(t))
	h.Apply(event("tcp", "127.0.0.1", portNobody))
	conn, err := net.Dial("tcp", "127.0.0.1:99")
	if err == nil {
		defer conn.Close()
		_, err = io.ReadAll(conn)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

func TestUDPFlows(t *testing.T) {
	if !ownHost(t) {
		return
	}
	h := newHostPorts(t, startGuest(t), newLog(t))
	h.flows.idle = 200 * time.Millisecond
	h.Apply(event("udp", "0.0.0.0", portEcho))
	if _, err := ask(t, "udp", "127.0.0.1:7"); err != nil {
		t.Fatal(err)
	}
	settles(t, "flows", func() int { return len(h.flows.slots) }, 0)
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)

	// A large datagram comes through, as long as it finds room in the buffers.
	large, err := net.Dial("udp4", "127.0.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	large.SetDeadline(time.Now().Add(limit))
	b := make([]byte, 1<<16)
	text := strings.Repeat("x", 60000)
	fmt.Fprint(large, text)
	if n, err := large.Read(b); string(b[:n]) != "127.0.0.1:7 "+text || err != nil {
		t.Errorf("a large datagram: %d bytes, %v", n, err)
	}
	large.Close()

	// Each client has its own answers.
	var clients [50]*net.UDPConn
	for i := range clients {
		conn, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IP(podV4.AsSlice()), Port: portEcho})
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(limit))
		fmt.Fprintf(conn, "client %d %s", i, strings.Repeat("x", 10*i))
		clients[i] = conn
	}
	for i, conn := range clients {
		n, err := conn.Read(b)
		want := fmt.Sprintf("10.99.0.5:7 client %d %s", i, strings.Repeat("x", 10*i))
		if got := string(b[:n]); got != want || err != nil {
			t.Errorf("client %d reads %.40q, %v", i, got, err)
		}
		conn.Close()
	}
	settles(t, "flows", func() int { return len(h.flows.slots) }, 0)
	settles(t, "goroutines", runtime.NumGoroutine, goroutines)
	settles(t, "descriptors", func() int { return descriptors(t) }, fds)
}

func TestTarget(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, c := range []struct {
		guest              []netip.Addr
		listen, came, want string
	}{
		{nil, "127.0.0.1", "127.0.0.1", "127.0.0.1"},
		{nil, "192.0.2.9", "192.0.2.9", "192.0.2.9"},
		{nil, "0.0.0.0", "192.0.2.9", "127.0.0.1"},
		{nil, "::", "2001:db8::9", "::1"},
		{[]netip.Addr{v4, v6}, "0.0.0.0", "192.0.2.9", "192.0.2.1"},
		{[]netip.Addr{v4, v6}, "::", "2001:db8::9", "2001:db8::1"},
		{[]netip.Addr{v4, v6}, "::", "::1", "::1"},
		{[]netip.Addr{v4, v6}, "0.0.0.0", "127.0.0.3", "127.0.0.1"},
		{[]netip.Addr{v4}, "::", "2001:db8::9", "::1"},
	} {
		h := &HostPorts{guest: c.guest}
		e := endpoint{forward.TCP, netip.AddrPortFrom(netip.MustParseAddr(c.listen), 80)}
		if got := h.target(e, netip.MustParseAddr(c.came)); got.Addr.String() != c.want || got.Port != 80 {
			t.Errorf("%+v: %s", c, got)
		}
	}
}
