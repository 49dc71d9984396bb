package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/undo"
)

// An endpoint is an interface of the namespace that the VM has as a NIC. It does
// not change, but for the files of its NIC.
type endpoint struct {
	index  int  // of the interface
	tap    int  // index of our tap; 0 for a direct one
	direct bool // the interface is itself the VM's tap
	nic    hypervisor.NIC
	undo   undo.Stack
}

// plug makes the endpoint of an interface. On error nothing is left.
func (n *Network) plug(ctx context.Context, link netlink.Link) (_ *endpoint, err error) {
	a := link.Attrs()
	e := &endpoint{index: a.Index}
	n.mu.Lock()
	e.nic = hypervisor.NIC{ID: "nic" + strconv.Itoa(n.made), MAC: slices.Clone(a.HardwareAddr), MTU: a.MTU}
	n.made++
	n.mu.Unlock()
	e.undo.Push("close the files", undoTimeout, func(context.Context) error { n.closeFiles(e); return nil })
	defer func() {
		if err == nil {
			return
		}
		if vanished(err) {
			err = fmt.Errorf("%w: it was taken away meanwhile: %w", err, errdefs.ErrNotFound)
		}
		err = errors.Join(fmt.Errorf("join interface %q with the VM: %w", a.Name, err), e.undo.Run(ctx))
	}()

	tap, persistent := link.(*netlink.Tuntap)
	persistent = persistent && !tap.NonPersist
	if persistent {
		e.direct, err = n.takeTap(e, tap)
	}
	if err == nil && !e.direct {
		err = n.mirror(e, link)
	}
	if err == nil && n.o.VhostNet {
		e.nic.Vhost, err = openVhost(n.devices.vhost, len(e.nic.Taps))
	}
	return e, err
}

// add makes an endpoint one of the VM's.
func (n *Network) add(e *endpoint) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.endpoints = append(n.endpoints, e)
}

// unplug takes an endpoint's traces out of the namespace. What is gone is no error.
func (n *Network) unplug(e *endpoint) error {
	if err := e.undo.Run(context.Background()); err != nil {
		return fmt.Errorf("take %s out of the network namespace: %w", e.nic.ID, err)
	}
	return nil
}

func (n *Network) closeFiles(e *endpoint) {
	n.mu.Lock()
	files := slices.Concat(e.nic.Taps, e.nic.Vhost)
	e.nic.Taps, e.nic.Vhost = nil, nil
	n.mu.Unlock()
	for _, file := range files {
		_ = file.Close() // nothing was written that could be lost
	}
}

// takeTap gives a tap that the CNI made to the VM as it is. It returns false where
// somebody else is at the far end, as with slirp4netns: such a tap is mirrored like
// any other interface.
func (n *Network) takeTap(e *endpoint, tap *netlink.Tuntap) (bool, error) {
	queues := 1
	if tap.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
		queues = n.o.Queues
	}
	files, _, err := n.openTap(tap.Name, queues, tap.Flags&netlink.TUNTAP_MULTI_QUEUE != 0)
	if errors.Is(err, unix.EBUSY) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	e.nic.Taps = files
	// The MAC address becomes the guest's. Two of a kind on one link hear nothing
	// from each other, so the near end gets a neighbouring one, as libvirt does it.
	near := slices.Clone(tap.HardwareAddr)
	if near[0] = 0xfe; bytes.Equal(near, tap.HardwareAddr) {
		near[0] = 0xfa
	}
	if err := n.handle.LinkSetHardwareAddr(tap, near); err != nil {
		return false, fmt.Errorf("set the MAC address: %w", err)
	}
	e.undo.Push("restore the MAC address", undoTimeout, func(context.Context) error {
		return ifThere(n.handle.LinkSetHardwareAddr(tap, e.nic.MAC))
	})
	return true, nil
}

// mirror makes a tap and has all frames that come in by one of the two go out by
// the other.
func (n *Network) mirror(e *endpoint, link netlink.Link) error {
	// The kernel finds a free number. The tap lives as long as somebody has it open:
	// the end of this process and of the VM, however it comes, ends it too.
	files, name, err := n.openTap("husk%d", n.o.Queues, n.o.Queues > 1)
	if err != nil {
		return err
	}
	e.nic.Taps = files
	tap, err := n.handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the tap %q: %w", name, err)
	}
	e.tap = tap.Attrs().Index
	e.undo.Push("delete the tap", undoTimeout, func(context.Context) error { return ifThere(n.handle.LinkDel(tap)) })

	// The kernel refuses a tap whose frames would exceed 64 KiB with their header.
	if err := n.handle.LinkSetMTU(tap, min(link.Attrs().MTU, maxTapMTU)); err != nil {
		return fmt.Errorf("set the MTU of %q to %d: %w", name, link.Attrs().MTU, err)
	}
	// No word of the namespace's own stack may come to the guest by the tap. Without
	// IPv6 in the kernel there is none.
	if err := n.handle.LinkSetIP6AddrGenMode(tap, addrGenNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("keep %q from making addresses: %w", name, err)
	}
	if err := n.handle.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set %q up: %w", name, err)
	}
	if err := n.hearAll(e, link); err != nil {
		return err
	}
	if err := n.redirect(e, tap, link); err != nil {
		return err
	}
	return n.redirect(e, link, tap)
}

// Numbers of the kernel: IN6_ADDR_GEN_MODE_NONE, MAX_TAP_QUEUES, and ETH_MAX_MTU
// less a header.
const (
	addrGenNone = 1
	maxQueues   = 256
	maxTapMTU   = 65535 - 14
)

// hearAll has an interface pass on the frames of every multicast group: which ones
// the guest listens to, it does not know. A veth passes on all.
func (n *Network) hearAll(e *endpoint, link netlink.Link) error {
	if _, veth := link.(*netlink.Veth); veth || link.Attrs().RawFlags&unix.IFF_ALLMULTI != 0 {
		return nil
	}
	if err := n.handle.LinkSetAllmulticastOn(link); err != nil {
		return fmt.Errorf("hear all multicast: %w", err)
	}
	e.undo.Push("hear multicast as before", undoTimeout, func(context.Context) error {
		return ifThere(n.handle.LinkSetAllmulticastOff(link))
	})
	return nil
}

// openTap opens the queues of a tap in the namespace, which is made if there is
// none of that name; a "%d" in the name is a free number. It returns its name.
func (n *Network) openTap(name string, queues int, multi bool) (files []*os.File, _ string, err error) {
	defer func() {
		if err != nil {
			for _, file := range files {
				_ = file.Close()
			}
		}
	}()
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	err = n.inside(func() error {
		for range queues {
			fd, err := unix.Open(n.devices.tun, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				return fmt.Errorf("open %s: %v: a VM's network needs it (modprobe tun): %w", n.devices.tun, err, errdefs.ErrFailedPrecondition)
			}
			request, err := unix.NewIfreq(name)
			if err == nil {
				request.SetUint16(flags)
				err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
			}
			if err != nil {
				_ = unix.Close(fd)
				return fmt.Errorf("open the tap %q: %w", name, err)
			}
			name = request.Name()
			files = append(files, os.NewFile(uintptr(fd), name))
		}
		return nil
	})
	return files, name, err
}

// openVhost opens the device for each queue, or returns none on a host that has
// none.
func openVhost(path string, queues int) (files []*os.File, err error) {
	for range queues {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			return nil, nil
		}
		if err != nil {
			for _, file := range files {
				_ = file.Close()
			}
			return nil, fmt.Errorf("%w: allow it, or turn vhost-net off: %w", err, errdefs.ErrFailedPrecondition)
		}
		files = append(files, file)
	}
	return files, nil
}

// vanished tells that an interface is no longer there.
func vanished(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

func ifThere(err error) error {
	if vanished(err) {
		return nil
	}
	return err
}
