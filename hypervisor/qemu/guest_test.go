package qemu

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/husk-containers/husk/agent/boot"
	"github.com/husk-containers/husk/agent/channel"
	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/protocols/stream"
)

// This test binary is also the first process of the guests whose interfaces are
// tested. Over a connection to guestPort it takes one line and answers with one:
//
//	up MAC ADDRESS/BITS    wait for the interface, give it the address and set it
//	                       up; "ok NAME MTU"
//	gone MAC               wait until there is no such interface; "ok"
//
// and what is in guest_size_test.go. On TCP port echoPort of every interface it sends back what it gets.
const (
	guestPort = 2000
	echoPort  = 7
)

func TestMain(m *testing.M) {
	if os.Args[0] == "/init" {
		if err := guestMain(); err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
		}
		boot.PowerOff()
	}
	os.Exit(m.Run())
}

// guestMain returns when the host has closed the control connection.
func guestMain() error {
	params, err := boot.Up()
	if err != nil {
		return err
	}
	ctx := context.Background()
	host, err := channel.Open(ctx, params.Channel)
	if err != nil {
		return err
	}
	for port, serve := range map[uint32]func(net.Conn){
		stream.Port: func(conn net.Conn) {
			if _, err := stream.ReadToken(conn); err != nil || stream.Answer(conn, true) != nil {
				conn.Close()
			}
		},
		guestPort: func(conn net.Conn) {
			defer conn.Close()
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err == nil {
				fmt.Fprintln(conn, obey(strings.Fields(line)))
			}
		},
	} {
		ln, err := host.Listen(port)
		if err != nil {
			return err
		}
		go serveGuest(ln, serve) // to the guest's end, as the next
	}
	echo, err := net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
	if err != nil {
		return err
	}
	go serveGuest(echo, func(conn net.Conn) {
		defer conn.Close()
		io.Copy(conn, conn) //nolint:errcheck // the host sees what is missing
	})
	control, err := host.DialControl(ctx)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, control)
	return err
}

func serveGuest(ln net.Listener, serve func(net.Conn)) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go serve(conn)
	}
}

// obey carries out one line in the guest.
func obey(words []string) string {
	switch {
	case len(words) == 3 && words[0] == "up":
		link, err := awaitLink(words[1], true)
		if err != nil {
			return err.Error()
		}
		addr, err := netlink.ParseAddr(words[2])
		if err == nil {
			err = errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
		}
		if err != nil {
			return strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		return fmt.Sprintf("ok %s %d", link.Attrs().Name, link.Attrs().MTU)
	case len(words) == 2 && words[0] == "gone":
		if _, err := awaitLink(words[1], false); err != nil {
			return err.Error()
		}
		return "ok"
	}
	return obeySize(words)
}

// awaitLink waits until there is an interface with that MAC, or none.
func awaitLink(mac string, wanted bool) (netlink.Link, error) {
	updates, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		return nil, err
	}
	for {
		links, err := netlink.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue // one came or went meanwhile
		}
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().HardwareAddr.String() == mac })
		switch {
		case wanted && i >= 0:
			return links[i], nil
		case !wanted && i < 0:
			return nil, nil
		}
		if _, ok := <-updates; !ok {
			return nil, errors.New("no more word of interfaces")
		}
	}
}

// tell sends the guest a line and returns what follows "ok" in its answer.
func tell(ctx context.Context, vm hypervisor.VM, format string, args ...any) (string, error) {
	line := fmt.Sprintf(format, args...)
	conn, err := vm.Dial(ctx, guestPort)
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("tell the guest %q: %w", line, errors.Join(err, context.Cause(ctx)))
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(answer), "ok")
	if !ok {
		return "", fmt.Errorf("the guest on %q: %s", line, answer)
	}
	return strings.TrimSpace(rest), nil
}

// guestImageOfThisTest is the real initrd with this test binary in place of the
// agent, built once.
var guestImageOfThisTest = sync.OnceValues(func() ([]byte, error) {
	image, err := os.ReadFile(guestImage)
	if err != nil {
		return nil, err
	}
	self, err := staticSelf()
	if err != nil {
		return nil, err
	}
	// Of two archives in a row the kernel takes both, and of a file the later.
	over := bytes.NewBuffer(image)
	err = initrd.Write(over, initrd.File("init", 0o755, self))
	return over.Bytes(), err
})

// staticSelf returns this test binary, linked statically.
func staticSelf() ([]byte, error) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	exe, err := elf.NewFile(bytes.NewReader(self))
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(exe.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return self, nil
	}
	dir, err := os.MkdirTemp("", "husk-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "init")
	build := exec.Command("go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", file, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the test's guest: %w\n%s", err, out)
	}
	return os.ReadFile(file)
}

// testGuest returns a backend and the configuration of a VM that runs guestMain,
// or skips.
func testGuest(t *testing.T, channels ...string) (*QEMU, hypervisor.Config) {
	t.Helper()
	q, cfg := realQEMU(t)
	if _, err := os.Stat(guestImage); err != nil {
		t.Skipf("no guest image: %v; run make guest", err)
	}
	image, err := guestImageOfThisTest()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.Initrd, image, 0o644); err != nil {
		t.Fatal(err)
	}
	if channels != nil {
		q.Channels = channels
	}
	cfg.Kernel, cfg.MemoryMiB = guestKernel, 256
	q.FreePageReporting = true
	return q, cfg
}
