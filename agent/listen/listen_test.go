package listen

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// insideCgroup in the environment holds the cgroup that the test binary runs in,
// with a network namespace of its own.
const insideCgroup = "HUSK_LISTEN_CGROUP"

// TestInside runs TestWatch's half, if it is the inside of that.
func TestInside(t *testing.T) {
	cgroup := os.Getenv(insideCgroup)
	if cgroup == "" {
		t.Skip("runs in a cgroup and network namespace of its own, started by TestWatch")
	}
	loUp(t)
	t.Run("sockets", func(t *testing.T) { testSockets(t, cgroup) })
	t.Run("churn", func(t *testing.T) { testChurn(t, cgroup) })
	t.Run("end", func(t *testing.T) { testEnd(t, cgroup) })
}

func TestWatch(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading BPF programs needs root")
	}
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(dir + "/cgroup.procs"); err == nil {
			root = dir
		}
	}
	if root == "" {
		t.Skip("there is no cgroup v2 hierarchy")
	}
	dir, err := os.MkdirTemp(root, "husk-listen-")
	if err != nil {
		t.Skipf("no cgroup can be made: %v", err)
	}
	defer os.Remove(dir)
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestInside$", "-test.v", "-test.count=1", "-test.timeout=4m")
	cmd.Env = append(os.Environ(), insideCgroup+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, UseCgroupFD: true, CgroupFD: int(f.Fd())}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Skipf("%s", out)
	}
	t.Logf("%s", out)
}

// watch returns the events as text, and what ends them.
func watch(t *testing.T, cgroup string) (<-chan string, func()) {
	t.Helper()
	w, err := Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	events := make(chan string, 4*maxSockets)
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(e *agentv1.ListenEvent) {
			text := fmt.Sprintf("%s %s %d", strings.TrimPrefix(e.GetProtocol().String(), "PROTOCOL_"), e.GetAddress(), e.GetPort())
			if e.GetClosed() {
				text += " closed"
			}
			events <- text
		})
	}()
	return events, func() {
		t.Helper()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(limit):
			t.Fatal("Run does not end")
		}
	}
}

func expect(t *testing.T, events <-chan string, want ...string) {
	t.Helper()
	for _, want := range want {
		select {
		case got := <-events:
			if got != want {
				t.Errorf("event %q, want %q", got, want)
			}
		case <-time.After(limit):
			t.Fatalf("no event %q", want)
		}
	}
}

func testSockets(t *testing.T, cgroup string) {
	events, stop := watch(t, cgroup)
	defer stop()
	listen := func(network, addr string) net.Listener {
		t.Helper()
		ln, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	packets := func(network, addr string) net.PacketConn {
		t.Helper()
		conn, err := net.ListenPacket(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	closing := func(c interface{ Close() error }) {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}

	v4 := listen("tcp4", "127.0.0.1:81")
	expect(t, events, "TCP 127.0.0.1 81")
	all := listen("tcp", ":80")
	expect(t, events, "TCP :: 80")
	v6 := listen("tcp6", "[::1]:83")
	expect(t, events, "TCP ::1 83")
	any4 := listen("tcp4", "0.0.0.0:82")
	expect(t, events, "TCP 0.0.0.0 82")

	// Neither a connection nor its end is a listener, nor is a client's socket.
	conn, err := net.Dial("tcp", "127.0.0.1:81")
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := v4.Accept()
	if err != nil {
		t.Fatal(err)
	}
	closing(conn)
	closing(accepted)
	client := packets("udp4", "127.0.0.1:0")
	query, err := net.Dial("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	query.Write([]byte("?"))

	udp := packets("udp", ":53")
	expect(t, events, "UDP :: 53")
	udp4 := packets("udp4", "127.0.0.1:54")
	expect(t, events, "UDP 127.0.0.1 54")
	closing(query)
	closing(client)

	closing(v4)
	expect(t, events, "TCP 127.0.0.1 81 closed")
	closing(v6)
	expect(t, events, "TCP ::1 83 closed")
	closing(all)
	expect(t, events, "TCP :: 80 closed")
	closing(any4)
	expect(t, events, "TCP 0.0.0.0 82 closed")
	closing(udp)
	expect(t, events, "UDP :: 53 closed")
	closing(udp4)
	expect(t, events, "UDP 127.0.0.1 54 closed")

	// A port from the kernel is one to report, of TCP.
	var plain net.ListenConfig // what is not multipath TCP
	plain.SetMultipathTCP(false)
	free, err := plain.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	expect(t, events, fmt.Sprintf("TCP 127.0.0.1 %d", port))
	closing(free)
	expect(t, events, fmt.Sprintf("TCP 127.0.0.1 %d closed", port))

	// A port that two sockets share is given up by the last.
	reuse := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
	}}
	var shared [2]net.Listener
	for i := range shared {
		if shared[i], err = reuse.Listen(t.Context(), "tcp4", "127.0.0.1:90"); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, events, "TCP 127.0.0.1 90")
	closing(shared[0])
	next := listen("tcp4", "127.0.0.1:91")
	expect(t, events, "TCP 127.0.0.1 91")
	closing(next)
	expect(t, events, "TCP 127.0.0.1 91 closed")
	closing(shared[1])
	expect(t, events, "TCP 127.0.0.1 90 closed")

	// A listener that is shut down listens no more.
	down := listen("tcp4", "127.0.0.1:92")
	expect(t, events, "TCP 127.0.0.1 92")
	raw, err := down.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	expect(t, events, "TCP 127.0.0.1 92 closed")
	closing(down)

	// Another namespace's sockets are not the guest's.
	other := exec.Command("/proc/self/exe", "-test.run=^TestListenBriefly$")
	other.Env = append(os.Environ(), briefly+"=1")
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if out, err := other.CombinedOutput(); err != nil {
		t.Errorf("listen in another namespace: %v\n%s", err, out)
	}
	// A process that dies closes its sockets.
	dying := exec.Command("/proc/self/exe", "-test.run=^TestListenBriefly$")
	dying.Env = append(os.Environ(), briefly+"=2")
	in, err := dying.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := dying.Start(); err != nil {
		t.Fatal(err)
	}
	expect(t, events, "TCP 127.0.0.1 99")
	dying.Process.Kill()
	dying.Wait() //nolint:errcheck // killed
	in.Close()
	expect(t, events, "TCP 127.0.0.1 99 closed")
}

const briefly = "HUSK_LISTEN_BRIEFLY"

// TestListenBriefly is a process of another test: it listens, until the end of
// stdin or not at all long.
func TestListenBriefly(t *testing.T) {
	if os.Getenv(briefly) == "" {
		t.Skip("runs as a process of TestInside")
	}
	ln, err := net.Listen("tcp4", "127.0.0.1:99")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv(briefly) == "2" {
		os.Stdin.Read(make([]byte, 1))
	}
	ln.Close()
}

// However many come and go, at the end the reports are right.
func testChurn(t *testing.T, cgroup string) {
	events, stop := watch(t, cgroup)
	defer stop()
	open := map[string]bool{}
	note := func(e string) {
		if name, closed := strings.CutSuffix(e, " closed"); closed {
			if !open[name] {
				t.Errorf("%q, which was not open", e)
			}
			delete(open, name)
		} else {
			if open[e] {
				t.Errorf("%q twice", e)
			}
			open[e] = true
		}
	}
	for round := range 20 {
		var conns []net.PacketConn
		for port := range 100 {
			conn, err := net.ListenPacket("udp4", fmt.Sprintf("127.0.0.1:%d", 2000+port))
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
		if round == 19 {
			conns, _ = conns[1:], conns[0].Close()
		}
		for _, conn := range conns {
			conn.Close()
		}
	}
	last, err := net.Listen("tcp4", "127.0.0.1:3000")
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	for {
		select {
		case e := <-events:
			note(e)
			if e == "TCP 127.0.0.1 3000" {
				if len(open) != 1 {
					t.Errorf("open at the end: %v", open)
				}
				return
			}
		case <-time.After(limit):
			t.Fatal("the last listener is not reported")
		}
	}
}

// After the end nothing is left, and a new Watcher works.
func testEnd(t *testing.T, cgroup string) {
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	for range 20 {
		events, stop := watch(t, cgroup)
		ln, err := net.Listen("tcp4", "127.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		expect(t, events, "TCP 127.0.0.1 80")
		stop()
		ln.Close()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// loUp sets lo up, which takes no more than this.
func loUp(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefused(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("opened what is not there")
	}
	// No cgroup; without root it goes no further than the map.
	if _, err := Open(t.TempDir()); err == nil || !strings.Contains(err.Error(), "CONFIG_CGROUP_BPF") {
		t.Errorf("opened what is no cgroup: %v", err)
	}
}

func TestChanges(t *testing.T) {
	parse := func(names ...string) []endpoint {
		var all []endpoint
		for _, name := range names {
			var s socket
			var kind, addr string
			var port int
			fmt.Sscan(name, &kind, &addr, &port)
			ip := net.ParseIP(addr)
			s[28], s[30] = unix.AF_INET6, map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}[kind]
			copy(s[8:24], ip.To16())
			if strings.Contains(addr, ".") && !strings.Contains(addr, ":") {
				s[28] = unix.AF_INET
				copy(s[8:24], append(ip.To4(), make([]byte, 12)...))
			}
			s[24], s[25] = byte(port), byte(port>>8)
			e, ok := s.endpoint()
			if !ok {
				t.Fatal(name)
			}
			all = append(all, e)
		}
		slices.SortFunc(all, endpoint.compare)
		return slices.Compact(all)
	}
	for _, c := range []struct {
		from, to []endpoint
		want     string
	}{
		{nil, nil, ""},
		{nil, parse("udp :: 53", "tcp :: 80", "tcp 0.0.0.0 80", "tcp 0.0.0.0 80"), "1 0.0.0.0 80 false; 1 :: 80 false; 2 :: 53 false; "},
		{parse("tcp ::1 80"), parse("tcp ::1 80"), ""},
		{parse("tcp ::1 80"), nil, "1 ::1 80 true; "},
		{parse("tcp ::1 80", "tcp ::1 443"), parse("tcp ::1 79", "tcp ::1 443"), "1 ::1 80 true; 1 ::1 79 false; "},
		{nil, parse("udp ::ffff:192.0.2.1 65535"), "2 192.0.2.1 65535 false; "},
	} {
		var got strings.Builder
		for _, e := range changes(c.from, c.to) {
			fmt.Fprintf(&got, "%d %s %d %v; ", e.GetProtocol(), e.GetAddress(), e.GetPort(), e.GetClosed())
		}
		if got.String() != c.want {
			t.Errorf("%v to %v: %q, want %q", c.from, c.to, got.String(), c.want)
		}
	}
	for _, s := range []socket{{}, {28: unix.AF_INET, 30: unix.IPPROTO_TCP}, {24: 1, 28: unix.AF_INET}, {24: 1, 28: unix.AF_UNIX, 30: 6}} {
		if e, ok := s.endpoint(); ok {
			t.Errorf("%v is %v", s, e)
		}
	}
}
