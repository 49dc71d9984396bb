package qemu

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
)

// A namespace is a network namespace of the test's own, which ends with the test.
// Its thread does what is asked of it there.
type namespace struct {
	work chan func()
	dir  string // of its thread in /proc
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{work: make(chan func())}
	made, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		n.dir = fmt.Sprintf("/proc/%d/task/%d", os.Getpid(), unix.Gettid())
		err := unix.Unshare(unix.CLONE_NEWNET)
		made <- err
		if err != nil {
			return
		}
		for f := range n.work {
			f()
		}
	}()
	if err := <-made; err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	t.Cleanup(func() {
		close(n.work)
		<-ended
	})
	return n
}

// do runs f in the namespace.
func (n *namespace) do(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error)
	n.work <- func() { done <- f() }
	if err := <-done; err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// tap makes a tap device that ends with its files, which end with the test.
func (n *namespace) tap(t *testing.T, name string, queues int) []*os.File {
	t.Helper()
	var files []*os.File
	n.do(t, "make a tap", func() error {
		for range queues {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			f := os.NewFile(uintptr(fd), name)
			t.Cleanup(func() { f.Close() }) //nolint:errcheck // it may be closed
			files = append(files, f)
			req, err := unix.NewIfreq(name)
			if err != nil {
				return err
			}
			flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			if queues > 1 {
				flags |= unix.IFF_MULTI_QUEUE
			}
			req.SetUint16(flags)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
				return err
			}
		}
		return nil
	})
	return files
}

// up gives an interface an address and sets it up.
func (n *namespace) up(t *testing.T, name, address string) {
	t.Helper()
	n.do(t, "set "+name+" up", func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if address != "" {
			addr, err := netlink.ParseAddr(address)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
}

// echo sends the guest much and little from the namespace, and compares what
// comes back.
func (n *namespace) echo(ctx context.Context, t *testing.T, address string) {
	t.Helper()
	var conn net.Conn
	n.do(t, "dial the guest", func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", address, echoPort))
		return err
	})
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		written <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-written); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d came back from %s, and %v", len(got), len(sent), address, err)
	}
}

// mirror has every frame that arrives at one of two interfaces leave by the other.
func (n *namespace) mirror(t *testing.T, a, b string) {
	t.Helper()
	n.do(t, "mirror", func() error {
		var links [2]netlink.Link
		for i, name := range []string{a, b} {
			var err error
			if links[i], err = netlink.LinkByName(name); err != nil {
				return err
			}
		}
		for i, from := range links {
			root := netlink.MakeHandle(0xffff, 0)
			if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: from.Attrs().Index, Handle: root, Parent: netlink.HANDLE_INGRESS,
			}}); err != nil {
				return err
			}
			to := netlink.NewMirredAction(links[1-i].Attrs().Index)
			if err := netlink.FilterAdd(&netlink.U32{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: root, Priority: 1, Protocol: unix.ETH_P_ALL},
				Actions:     []netlink.Action{to},
			}); err != nil {
				return err
			}
		}
		return nil
	})
}

// mac is the n-th of the test's addresses.
func mac(n byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, n} }

// onTap returns a NIC on a tap of the namespace, which has the address 10.0.n.1/24.
func (n *namespace) onTap(t *testing.T, number byte, queues int) hypervisor.NIC {
	t.Helper()
	name := fmt.Sprintf("eth%d", number)
	nic := hypervisor.NIC{ID: name, MAC: mac(number), MTU: 1500, Taps: n.tap(t, name, queues)}
	n.up(t, name, fmt.Sprintf("10.0.%d.1/24", number))
	return nic
}
