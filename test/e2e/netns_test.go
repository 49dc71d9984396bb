package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A netNS is a named network namespace whose eth0 has a peer in another one.
type netNS struct {
	*env
	path string
	// peer is the address of eth0's peer.
	peer string
	// gone is closed once the peer is: nobody holds the namespace any more.
	gone chan struct{}
}

// newNetNS makes a network namespace and gives it a name as `ip netns add` does.
func (e *env) newNetNS() *netNS {
	e.Helper()
	ns := &netNS{env: e, path: filepath.Join(e.d.Dir, "netns"), peer: "10.9.0.1", gone: make(chan struct{})}
	e.writeFile(ns.path, nil)
	e.Cleanup(func() {
		if _, err := os.Stat(ns.path); err == nil {
			ns.remove()
		}
	})
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		made <- ns.make(updates, done)
	}()
	if err := <-made; err != nil {
		e.Fatal(err)
	}
	var watch sync.WaitGroup
	watch.Go(func() { // ends with the subscription
		for u := range updates {
			if u.Header.Type == unix.RTM_DELLINK && u.Attrs().Name == "peer" {
				close(ns.gone)
			}
		}
	})
	e.Cleanup(func() { close(done); watch.Wait() })
	return ns
}

// make makes the namespaces, and leaves the calling thread in the peer's.
func (ns *netNS) make(updates chan<- netlink.LinkUpdate, done <-chan struct{}) error {
	other, err := netns.New()
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	defer other.Close()
	own, err := netns.New()
	if err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	defer own.Close()
	if err := unix.Mount("/proc/thread-self/ns/net", ns.path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("name a network namespace: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer", PeerNamespace: netlink.NsFd(int(other))}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make a pair of interfaces: %w", err)
	}
	if err := errors.Join(setUp("lo", net.IPv4(127, 0, 0, 1)), setUp("eth0", net.IPv4(10, 9, 0, 2))); err != nil {
		return err
	}
	if err := netns.Set(other); err != nil {
		return fmt.Errorf("enter a network namespace: %w", err)
	}
	if err := setUp("peer", net.ParseIP(ns.peer)); err != nil {
		return err
	}
	return netlink.LinkSubscribe(updates, done)
}

func setUp(name string, ip net.IP) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(24, 32)}}); err != nil {
		return fmt.Errorf("give interface %s an address: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	return nil
}

// remove takes the namespace's name away, as `ip netns del` does.
func (ns *netNS) remove() {
	ns.Helper()
	if err := unix.Unmount(ns.path, unix.MNT_DETACH); err != nil {
		ns.Errorf("unmount %s: %v", ns.path, err)
	}
	// By this the name is gone from mount namespaces that do not follow this one too.
	if err := os.Remove(ns.path); err != nil {
		ns.Error(err)
	}
}
