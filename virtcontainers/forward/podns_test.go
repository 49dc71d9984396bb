package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
)

// open forwards from a new pod to a new guest.
func open(t *testing.T) (*os.File, *PortForward) {
	t.Helper()
	dial := startGuest(t)
	pod := newPod(t)
	f, err := Open(t.Context(), pod, dial, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return pod, f
}

func TestPodsOwnAddressesReachTheGuest(t *testing.T) {
	pod, _ := open(t)
	big := strings.Repeat("x", 5<<20)
	for _, c := range []struct{ dial, text, want string }{
		{"127.0.0.1:7", "hello", "127.0.0.1:7 5 <nil>"},
		{"127.0.0.1:80", "", "127.0.0.1:80 0 <nil>"},
		{"[::1]:7", "hello", "[::1]:7 5 <nil>"},
		{"10.99.0.5:7", "hello", "10.99.0.5:7 5 <nil>"},
		{"[fd99::5]:7", "hello", "[fd99::5]:7 5 <nil>"},
		// A service on ::1 alone answers a port-forward, which asks 127.0.0.1.
		{"127.0.0.1:8", "hello", "[::1]:8 5 <nil>"},
		{"[::1]:8", "hello", "[::1]:8 5 <nil>"},
		{"127.0.0.1:7", big, "127.0.0.1:7 5242880 <nil>"},
	} {
		if got := say(t, dialIn(t, pod, c.dial), c.text); got != c.want {
			t.Errorf("%s answers %q, want %q", c.dial, got, c.want)
		}
	}
}

func TestRefusedInTheGuestIsResetInThePod(t *testing.T) {
	pod, f := open(t)
	for _, addr := range []string{
		"127.0.0.1:99", "[::1]:99", "10.99.0.5:99", "127.0.0.5:99",
		f.lns[0].Addr().String(), // the proxy's own port is a port of the guest like any
	} {
		if err := resets(pod, addr); err != nil {
			t.Error(err)
		}
	}
}

// What leaves the namespace is none of the proxy's business.
func TestOtherAddressesAreLeftAlone(t *testing.T) {
	pod, _ := open(t)
	_, err := within(pod, func() (net.Conn, error) { return net.DialTimeout("tcp", "192.0.2.1:7", limit) })
	if !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dial another host: %v, want no route", err)
	}
}

// A service that sends for ever must end when its client goes, whichever way.
func TestClientThatGoesEndsTheFlowInTheGuest(t *testing.T) {
	pod, _ := open(t)
	floods := func() int {
		n, err := strconv.Atoi(say(t, dialIn(t, pod, "127.0.0.1:9"), ""))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, linger := range []int{-1, 0} { // a close, and a reset
		conn := dialIn(t, pod, "127.0.0.1:19")
		if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		if n := floods(); n != 1 {
			t.Errorf("%d floods, want 1", n)
		}
		conn.SetLinger(linger)
		conn.Close()
		settles(t, "floods", floods, 0)
	}
}

func TestThousandConnectionsLeaveNothing(t *testing.T) {
	pod, _ := open(t)
	one := func() {
		if got, want := say(t, dialIn(t, pod, "127.0.0.1:7"), "hello"), "127.0.0.1:7 5 <nil>"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	one()
	settles(t, "", func() int { return 0 }, 0)
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	conns := make(chan struct{}, 1000)
	for range cap(conns) {
		conns <- struct{}{}
	}
	close(conns)
	var workers sync.WaitGroup
	for range 20 {
		workers.Go(func() {
			for range conns {
				conn, err := within(pod, func() (net.Conn, error) { return net.DialTimeout("tcp", "127.0.0.1:7", limit) })
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(conn, "hello")
				conn.(*net.TCPConn).CloseWrite()
				if b, err := io.ReadAll(conn); err != nil || string(b) != "127.0.0.1:7 5 <nil>" {
					t.Errorf("%q, %v", b, err)
				}
				conn.Close()
			}
		})
	}
	workers.Wait()
	settles(t, "goroutines", runtime.NumGoroutine, goroutines)
	settles(t, "descriptors", func() int { return descriptors(t) }, fds)
}

// tables are those of the namespace.
func tables(t *testing.T, ns *os.File) []string {
	t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	list, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, table := range list {
		names = append(names, table.Name)
	}
	return names
}

func TestCloseLeavesNothing(t *testing.T) {
	dial := startGuest(t)
	pod := newPod(t)
	fds := descriptors(t)
	f, err := Open(t.Context(), pod, dial, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := tables(t, pod); len(got) != 1 || got[0] != "husk" {
		t.Errorf("tables %v", got)
	}
	addr := f.lns[0].Addr().String()
	flowing := dialIn(t, pod, "127.0.0.1:7")
	for range 2 {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if _, err := io.ReadAll(flowing); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection read %v, want a reset", err)
	}
	flowing.Close()
	if got := tables(t, pod); len(got) != 0 {
		t.Errorf("tables %v left", got)
	}
	for _, addr := range []string{addr, "127.0.0.1:7"} {
		conn, err := within(pod, func() (net.Conn, error) { return net.Dial("tcp", addr) })
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, %v, want refused", addr, conn, err)
		}
	}
	settles(t, "descriptors", func() int { return descriptors(t) }, fds)
}

// A namespace of which the name is gone, and that its maker has closed, is there
// as long as the sockets in it are.
func TestCloseAfterTheNamespaceIsGone(t *testing.T) {
	dial := startGuest(t)
	pod := newPod(t)
	f, err := Open(t.Context(), pod, dial, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	pod.Close()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefused(t *testing.T) {
	needRoot(t)
	log := newLog(t)
	nobody := func(context.Context, uint32) (net.Conn, error) { return nil, errors.New("no guest") }
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fds := descriptors(t)
	if _, err := Open(t.Context(), file, nobody, log); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("not a namespace: %v", err)
	}
	settles(t, "descriptors", func() int { return descriptors(t) }, fds)
}

func TestOpenBeforeLoIsUp(t *testing.T) {
	dial := startGuest(t)
	pod := emptyNamespace(t)
	f, err := Open(t.Context(), pod, dial, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	setUpNamespace(t, pod)
	for _, addr := range []string{"127.0.0.1:7", "[::1]:7", "10.99.0.5:7", "[fd99::5]:7"} {
		if got, want := say(t, dialIn(t, pod, addr), ""), addr+" 0 <nil>"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// A table that is there was left by one that could not clean up.
func TestOpenReplacesWhatWasLeft(t *testing.T) {
	dial := startGuest(t)
	pod := newPod(t)
	left, err := newRedirect(pod, proxyPorts{v4: 1, v6: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer left.ns.Close()
	f, err := Open(t.Context(), pod, dial, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := say(t, dialIn(t, pod, "127.0.0.1:7"), ""), "127.0.0.1:7 0 <nil>"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// Nor does it matter to Close that somebody has flushed all tables.
	if err := left.close(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestWithoutAGuestConnectionsAreReset(t *testing.T) {
	pod := newPod(t)
	f, err := Open(t.Context(), pod, func(context.Context, uint32) (net.Conn, error) { return nil, errors.New("no guest") }, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := resets(pod, "127.0.0.1:7"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// A guest that takes the connection and says nothing holds nothing up.
func TestCloseBesideAGuestThatIsSilent(t *testing.T) {
	pod := newPod(t)
	dialled := make(chan net.Conn, 1)
	f, err := Open(t.Context(), pod, func(context.Context, uint32) (net.Conn, error) {
		host, guest := net.Pipe()
		dialled <- guest
		return host, nil
	}, newLog(t))
	if err != nil {
		t.Fatal(err)
	}
	conn := dialIn(t, pod, "127.0.0.1:7")
	guest := <-dialled
	defer guest.Close()
	begin := time.Now()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > connectTimeout/2 {
		t.Errorf("Close took %v", took)
	}
	if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}
