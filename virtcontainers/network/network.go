// Package network is how a pod's network namespace reaches its VM: a tap for each
// interface in the namespace, and what the guest is to be told of it.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// undoTimeout bounds taking one interface back; it is a few netlink requests.
const undoTimeout = 10 * time.Second

// Options say what the guest's devices are to be like.
type Options struct {
	// Queues of each tap, for which the VM has as many vCPUs: 0 counts as 1, and
	// more than 256, which is the kernel's limit, as 256.
	Queues int
	// VhostNet opens /dev/vhost-net for each queue, where this host has it.
	VhostNet bool
	// Log hears of changes that cannot be followed. It must be set.
	Log *slog.Logger
}

// A Network is the network namespace of a pod, its interfaces joined with taps:
//
//	         namespace of the pod                     VM
//	peer --- eth0 --ingress--> redirect --> husk0 --- virtio-net "eth0"
//	         eth0 <-- redirect <--ingress-- husk0     same MAC, MTU, addresses
//
// What comes in by eth0 goes to the guest before the namespace's own stack sees
// it, so the addresses stay where the CNI put them: the kernel goes on listening
// to the multicast groups of theirs, and who looks into the namespace finds what
// it expects. A connection that begins inside the namespace and goes to one of
// these addresses does not leave by eth0 but by lo; package forward takes it
// there.
//
// Its methods are safe for concurrent use, but Watch may run only once at a time.
type Network struct {
	o       Options
	devices devices
	ns      *os.File
	handle  *netlink.Handle
	events  *os.File

	mu        sync.Mutex // guards what follows, never a call
	endpoints []*endpoint
	guest     *agentv1.Network
	warned    map[string]bool
	made      int // endpoints so far, for their ids
	closed    bool
	watching  *watching // nil: Watch does not run
}

// A watching is one run of Watch.
type watching struct {
	stop context.CancelFunc
	done chan struct{} // closed when it has returned
}

// devices are the paths of the kernel's device files.
type devices struct{ tun, vhost string }

// Open joins every usable interface in the network namespace at path with a tap:
// each Ethernet interface that is up or has an address and is not the port of
// another one. The namespace is held open until Close, and so lives on when its
// name is deleted.
//
// NotFound where there is nothing at path or an interface vanished on the way,
// InvalidArgument where it is no network namespace or an interface in it cannot be
// a guest's, FailedPrecondition where it is this process's own or the host lacks
// something, NotImplemented for what a guest cannot have. On error nothing is left
// in the namespace.
func Open(ctx context.Context, path string, o Options) (*Network, error) {
	return open(ctx, path, o, devices{tun: "/dev/net/tun", vhost: "/dev/vhost-net"})
}

func open(ctx context.Context, path string, o Options, d devices) (_ *Network, err error) {
	n := &Network{o: o, devices: d, warned: map[string]bool{}, guest: &agentv1.Network{}}
	n.o.Queues = min(max(o.Queues, 1), maxQueues)
	if n.ns, err = openNS(path); err != nil {
		return nil, fmt.Errorf("open network namespace %q: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	err = n.inside(func() (err error) {
		if n.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		n.events, err = subscribe() // before the scan, that no change is missed
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("enter network namespace %q: %w", path, err)
	}
	found, err := n.scan()
	if err != nil {
		return nil, fmt.Errorf("read network namespace %q: %w", path, err)
	}
	links := found.usable(nil, nil)
	if err := check(links); err != nil {
		return nil, fmt.Errorf("network namespace %q: %w", path, err)
	}
	guest, dropped, err := found.guest(links)
	if err != nil {
		return nil, fmt.Errorf("network namespace %q: %w", path, err)
	}
	for _, link := range links {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("network namespace %q: %w", path, err)
		}
		e, err := n.plug(ctx, link)
		if err != nil {
			return nil, fmt.Errorf("network namespace %q: %w", path, err)
		}
		n.add(e)
	}
	n.settle(guest, dropped)
	return n, nil
}

// openNS opens a network namespace other than this process's own.
func openNS(path string) (*os.File, error) {
	// Not to wait for a writer, should it be a FIFO.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("it does not exist: it was deleted, or the spec names a wrong path: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	kind, err := unix.IoctlRetInt(int(file.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		_ = file.Close()
		return nil, fmt.Errorf("it is no network namespace: the spec names a wrong path, or the namespace was unmounted: %w", errdefs.ErrInvalidArgument)
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	own, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if os.SameFile(own, info) {
		_ = file.Close()
		return nil, fmt.Errorf("it is the host's own, whose interfaces a VM would take over: leave the path out for the host's network: %w", errdefs.ErrFailedPrecondition)
	}
	return file, nil
}

// settle notes what the guest is to have now, and logs what it cannot have.
func (n *Network) settle(guest *agentv1.Network, dropped []string) {
	n.mu.Lock()
	n.guest = guest
	n.mu.Unlock()
	for _, what := range dropped {
		n.warn("part of the pod's network is not carried into its VM: " + what)
	}
}

// warn logs a message once: it would come again with every change.
func (n *Network) warn(message string) {
	n.mu.Lock()
	known := n.warned[message]
	n.warned[message] = true
	n.mu.Unlock()
	if !known {
		n.o.Log.Warn(message)
	}
}

// NICs returns the devices that the VM is to have. Their files stay open until
// CloseFiles or Close.
func (n *Network) NICs() []hypervisor.NIC {
	n.mu.Lock()
	defer n.mu.Unlock()
	nics := make([]hypervisor.NIC, len(n.endpoints))
	for i, e := range n.endpoints {
		nics[i] = e.nic
	}
	return nics
}

// CloseFiles closes the files of all NICs, once the VM has them. A tap vanishes
// when its last file is closed: that is when the VM ends.
func (n *Network) CloseFiles() {
	n.mu.Lock()
	endpoints := slices.Clone(n.endpoints)
	n.mu.Unlock()
	for _, e := range endpoints {
		n.closeFiles(e)
	}
}

// Guest returns what the guest's network is to be: its interfaces and addresses,
// the routes of the main table, the permanent neighbours. Left out is what the
// guest's kernel makes of itself. It must not be changed.
func (n *Network) Guest() *agentv1.Network {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.guest
}

// NS returns the open namespace, which is the Network's own until Close.
func (n *Network) NS() *os.File { return n.ns }

// Close ends Watch, takes taps and filters out of the namespace and lets go of it.
// It is idempotent; what has gone already is no error.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	watching := n.watching
	n.mu.Unlock()

	var errs []error
	if n.events != nil {
		errs = append(errs, n.events.Close())
	}
	if watching != nil {
		watching.stop()
		<-watching.done
	}
	n.mu.Lock()
	endpoints := n.endpoints
	n.endpoints = nil
	n.mu.Unlock()
	for _, e := range slices.Backward(endpoints) {
		errs = append(errs, n.unplug(e))
	}
	if n.handle != nil {
		n.handle.Close()
	}
	return errors.Join(append(errs, n.ns.Close())...)
}
