package network

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// patience is for what the kernel does at once on a machine that does something
// else.
const patience = time.Minute

// A namespace is a network namespace of the test's own, with a name.
type namespace struct {
	t    *testing.T
	path string
	file *os.File
	h    *netlink.Handle
}

// newNamespace skips the test where no network namespaces can be had.
func newNamespace(t *testing.T) *namespace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes network namespaces: needs root")
	}
	for _, program := range []string{"nsenter", "ip", "tc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("configures network namespaces: needs " + program)
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("makes taps: needs /dev/net/tun")
	}
	n := &namespace{t: t, path: filepath.Join(t.TempDir(), "net")}
	if err := os.WriteFile(n.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		// The thread comes back to the host's namespace, which is where it is now.
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		defer own.Close() //nolint:errcheck // read only
		done <- within(own, func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if err := unix.Mount("/proc/thread-self/ns/net", n.path, "", unix.MS_BIND, ""); err != nil {
				return os.NewSyscallError("mount", err)
			}
			n.h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
			return err
		})
	}()
	if err := <-done; err != nil {
		t.Skip("no network namespace can be made: ", err)
	}
	var err error
	if n.file, err = os.Open(n.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	return n
}

// unname deletes the namespace's name.
func (n *namespace) unname() {
	if err := unix.Unmount(n.path, unix.MNT_DETACH); err == nil {
		_ = os.Remove(n.path)
	}
}

// close lets go of the namespace.
func (n *namespace) close() {
	n.unname()
	if n.h != nil {
		n.h.Close()
		_ = n.file.Close()
		n.h = nil
	}
}

// run runs a command line in the namespace and returns what it prints.
func (n *namespace) run(line string) string {
	n.t.Helper()
	return n.feed("", line)
}

// batch runs many lines of iproute2 at once.
func (n *namespace) batch(lines string) {
	n.t.Helper()
	n.feed(lines, "ip -batch -")
}

func (n *namespace) feed(input, line string) string {
	n.t.Helper()
	enter := []string{"--net=" + fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())}
	cmd := exec.Command("nsenter", append(enter, strings.Fields(line)...)...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// ip runs lines of iproute2.
func (n *namespace) ip(lines ...string) {
	n.t.Helper()
	for _, line := range lines {
		n.run("ip " + line)
	}
}

// lacks skips the test if the kernel has no interfaces of a kind.
func (n *namespace) lacks(kind string) {
	n.t.Helper()
	la := netlink.NewLinkAttrs()
	la.Name = "try"
	link := &netlink.GenericLink{LinkAttrs: la, LinkType: kind}
	if err := n.h.LinkAdd(link); err != nil {
		n.t.Skipf("the kernel makes no %s: %v", kind, err)
	}
	if err := n.h.LinkDel(link); err != nil {
		n.t.Fatal(err)
	}
}

// link returns an interface of the namespace.
func (n *namespace) link(name string) netlink.Link {
	n.t.Helper()
	link, err := n.h.LinkByName(name)
	if err != nil {
		n.t.Fatalf("interface %q: %v", name, err)
	}
	return link
}

// state is what must be as before once a Network was closed.
func (n *namespace) state() string {
	n.t.Helper()
	return n.run("ip -o link") + n.run("ip -o addr") + n.run("ip route") + n.run("ip -6 route") + n.run("tc qdisc")
}

// files counts the open files of this process, by what they are.
func files(t *testing.T) map[string]int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]int{}
	for _, e := range entries {
		target, _ := os.Readlink("/proc/self/fd/" + e.Name())
		kind, _, _ := strings.Cut(target, "[")
		open[kind]++
	}
	return open
}

// node is a namespace with a bridge that has 10.9.0.1/24 and fd09::1/64, and pod
// one whose eth0 is on that bridge, with 10.9.0.2/24 and fd09::2/64 and MTU 1400.
func nodeAndPod(t *testing.T) (node, pod *namespace) {
	t.Helper()
	node, pod = newNamespace(t), newNamespace(t)
	node.lacks("bridge")
	node.ip("link set lo up", "link add br0 type bridge", "addr add 10.9.0.1/24 dev br0", "addr add fd09::1/64 dev br0 nodad", "link set br0 up")
	joinPod(node, pod, "eth0", "mtu 1400")
	pod.ip("link set lo up", "addr add 10.9.0.2/24 dev eth0", "addr add fd09::2/64 dev eth0 nodad", "route add default via 10.9.0.1")
	return node, pod
}

// joinPod makes an interface of the pod that is on the node's bridge.
func joinPod(node, pod *namespace, name, options string) {
	node.t.Helper()
	node.ip(fmt.Sprintf("link add p-%s %s type veth peer name %s %s", name, options, name, options), "link set p-"+name+" master br0 up")
	link := node.link(name)
	if err := node.h.LinkSetNsFd(link, int(pod.file.Fd())); err != nil {
		node.t.Fatal(err)
	}
	// No address of the kernel's: it comes, and loses its mark "tentative", late.
	pod.ip("link set "+name+" addrgenmode none", "link set "+name+" up")
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func testOptions(t *testing.T) Options {
	return Options{Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// mustOpen opens the pod's network, and closes it at the test's end.
func mustOpen(t *testing.T, pod *namespace, o Options) *Network {
	t.Helper()
	n, err := Open(testContext(t), pod.path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func netnsHandle(n *namespace) netns.NsHandle { return netns.NsHandle(n.file.Fd()) }
