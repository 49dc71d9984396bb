package forward

import (
	"bufio"
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
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	agent "github.com/husk-containers/husk/agent/forward"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// guestSocket in the environment makes this test binary a guest whose agent
// serves the socket of that path.
const guestSocket = "HUSK_FORWARD_GUEST"

// What the guest has: its own addresses, and services at ports.
var (
	podV4 = netip.MustParseAddr("10.99.0.5")
	podV6 = netip.MustParseAddr("fd99::5")
)

const (
	portEcho   = 7  // tcp and udp, everywhere: see echo
	portV6Only = 8  // echo on ::1
	portCount  = 9  // how many connections to portFlood there are
	portFlood  = 19 // writes for ever, 127.0.0.1
	portNobody = 99
)

func TestMain(m *testing.M) {
	if path := os.Getenv(guestSocket); path != "" {
		if err := guestMain(path); err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// guestMain runs in a network namespace of its own until stdin ends.
func guestMain(path string) error {
	if err := setUp(netns.None()); err != nil {
		return err
	}
	for _, addr := range []string{"127.0.0.1:7", "[::1]:7", "10.99.0.5:7", "[fd99::5]:7", "127.0.0.1:80", "[::1]:8"} {
		if err := service(addr, echo); err != nil {
			return err
		}
		if err := packetEcho(addr); err != nil {
			return err
		}
	}
	var floods atomic.Int64
	if err := service("127.0.0.1:19", func(conn *net.TCPConn) {
		floods.Add(1)
		defer floods.Add(-1)
		for b := make([]byte, 1<<16); ; {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	}); err != nil {
		return err
	}
	if err := service("127.0.0.1:9", func(conn *net.TCPConn) { fmt.Fprint(conn, floods.Load()) }); err != nil {
		return err
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	fmt.Println("ready")
	return agent.Serve(ctx, ln, nil)
}

func service(addr string, serve func(*net.TCPConn)) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			}()
		}
	}()
	return nil
}

// echo tells whom it is and, after the end of its input, how much that was.
func echo(conn *net.TCPConn) {
	n, err := io.Copy(io.Discard, conn)
	fmt.Fprintf(conn, "%s %d %v", conn.LocalAddr(), n, err)
}

func packetEcho(addr string) error {
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			conn.WriteTo([]byte(fmt.Sprintf("%s %s", conn.LocalAddr(), b[:n])), from)
		}
	}()
	return nil
}

// setUp gives lo of a network namespace its own addresses and a pod's; of none, of
// this thread's.
func setUp(ns netns.NsHandle) error {
	handle, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := handle.LinkSetUp(lo); err != nil {
		return err
	}
	routes, err := nl.SubscribeAt(ns, netns.None(), unix.NETLINK_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return err
	}
	defer routes.Close()
	for _, addr := range []netip.Addr{podV4, podV6} {
		ip := net.IP(addr.AsSlice())
		bits := addr.BitLen()
		if err := handle.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}, Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("add %s: %w", addr, err)
		}
	}
	return awaitLocal(routes, podV6)
}

// awaitLocal reads until addr has its route to this host: of IPv6 the kernel makes
// it some time after the address, and until then there is no connection to it.
func awaitLocal(routes *nl.NetlinkSocket, addr netip.Addr) error {
	if err := routes.SetReceiveTimeout(&unix.Timeval{Sec: int64(limit / time.Second)}); err != nil {
		return err
	}
	for {
		messages, _, err := routes.Receive()
		if err != nil {
			return fmt.Errorf("wait for the route to %s: %w", addr, err)
		}
		for _, m := range messages {
			if m.Header.Type != unix.RTM_NEWROUTE || nl.DeserializeRtMsg(m.Data).Type != unix.RTN_LOCAL {
				continue
			}
			attributes, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:])
			if err != nil {
				return err
			}
			for _, a := range attributes {
				if a.Attr.Type == unix.RTA_DST && bytes.Equal(a.Value, addr.AsSlice()) {
					return nil
				}
			}
		}
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
}

// startGuest returns the dial of a guest in a process of its own.
func startGuest(t *testing.T) Dial {
	t.Helper()
	needRoot(t)
	path := filepath.Join(t.TempDir(), "channel")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), guestSocket+"="+path)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("guest: %v", err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("guest says %q, %v", line, err)
	}
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		if port != 1026 {
			return nil, fmt.Errorf("no port %d", port)
		}
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

// emptyNamespace returns a new network namespace.
func emptyNamespace(t *testing.T) *os.File {
	t.Helper()
	needRoot(t)
	type result struct {
		ns  *os.File
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.ns, r.err = os.Open("/proc/thread-self/ns/net")
		}
		done <- r
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	return r.ns
}

// newPod returns a network namespace with a pod's addresses.
func newPod(t *testing.T) *os.File {
	t.Helper()
	ns := emptyNamespace(t)
	setUpNamespace(t, ns)
	return ns
}

func setUpNamespace(t *testing.T, ns *os.File) {
	t.Helper()
	if err := setUp(netns.NsHandle(ns.Fd())); err != nil {
		t.Fatal(err)
	}
}

// within runs f on a thread in the network namespace ns.
func within[T any](ns *os.File, f func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends
		var r result
		if r.err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); r.err == nil {
			r.v, r.err = f()
		}
		done <- r
	}()
	r := <-done
	return r.v, r.err
}

// dialIn connects from within a namespace.
func dialIn(t *testing.T, ns *os.File, addr string) *net.TCPConn {
	t.Helper()
	conn, err := within(ns, func() (net.Conn, error) { return net.DialTimeout("tcp", addr, limit) })
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(limit))
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// resets reports whether a connection from within a namespace is reset, in the
// course of the connect or afterwards.
func resets(ns *os.File, addr string) error {
	conn, err := within(ns, func() (net.Conn, error) { return net.DialTimeout("tcp", addr, limit) })
	if err == nil {
		conn.SetDeadline(time.Now().Add(limit))
		_, err = io.ReadAll(conn)
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("%s: %w, want a reset", addr, err)
	}
	return nil
}

// say sends text, half-closes, and returns all that comes back.
func say(t *testing.T, conn *net.TCPConn, text string) string {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

func newLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// descriptors is how many this process has.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// settles waits until f is at most want: what ends things is asynchronous.
func settles(t *testing.T, what string, f func() int, want int) {
	t.Helper()
	for deadline := time.Now().Add(limit); f() > want; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("%d %s, want %d", f(), what, want)
			return
		}
	}
}
