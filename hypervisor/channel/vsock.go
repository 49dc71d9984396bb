package channel

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

const (
	vhostDevice = "/dev/vhost-vsock"
	// setGuestCID is VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h,
	// _IOW(0xAF, 0x60, __u64).
	setGuestCID = 0x4008AF60
	// CIDs of guests: 0 to 2 are the kernel's, and Husk keeps to the lower half
	// of the rest.
	minCID = 3
	maxCID = 1<<31 - 1
	// claimAttempts CIDs in use, one after the other, do not happen by chance.
	claimAttempts = 16

	vhostRemedy = "load it with `modprobe vhost_vsock` and give this user access to " + vhostDevice
)

// A Vsock is a guest CID of this host, claimed in the kernel for as long as the
// vhost device is open here or in the VMM.
type Vsock struct {
	cid      uint32
	vhost    *os.File
	listener *vsock.Listener
	inbox    inbox

	done chan struct{} // closed when the accept loop has ended
	err  error         // why; set before that
}

// VsockUsable tells why vhost-vsock cannot be used on this host and what mends
// that, or nil where it can.
func VsockUsable() error {
	f, err := openVhost()
	if err != nil {
		return err
	}
	f.Close() //nolint:errcheck // nothing was done with it
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("create vsock socket: %w; load vsock with `modprobe vsock`", err)
	}
	unix.Close(fd) //nolint:errcheck // nothing was done with it
	return nil
}

// OpenVsock claims a guest CID that is free on this host, and listens for its
// guest on a free port.
func OpenVsock() (*Vsock, error) {
	f, err := openVhost()
	if err != nil {
		return nil, err
	}
	cid, err := claimCID(randomCID, func(cid uint32) error { return claim(f, cid) })
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	v, err := newVsock(f, cid, vsock.Host)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return v, nil
}

// newVsock listens on a CID of the host for the guest with a given one.
func newVsock(vhost *os.File, guest, host uint32) (*Vsock, error) {
	l, err := vsock.ListenContextID(host, 0, nil)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest on vsock CID %d: %w; %s", host, err, vhostRemedy)
	}
	v := &Vsock{
		cid:      guest,
		vhost:    vhost,
		listener: l,
		inbox:    newInbox(),
		done:     make(chan struct{}),
	}
	go v.acceptLoop() // Close waits for it
	return v, nil
}

func openVhost() (*os.File, error) {
	f, err := os.OpenFile(vhostDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, vhostRemedy)
	}
	return f, nil
}

// claimCID tries CIDs until one is free.
func claimCID(pick func() uint32, claim func(uint32) error) (uint32, error) {
	var err error
	for range claimAttempts {
		cid := pick()
		if err = claim(cid); err == nil {
			return cid, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return 0, fmt.Errorf("claim guest CID: %w", err)
}

// claim reserves cid for f. The kernel does not ask for an owner first, so the
// VMM is still free to become the owner of f and to set the same CID again.
func claim(f *os.File, cid uint32) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	arg := uint64(cid)
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, setGuestCID, uintptr(unsafe.Pointer(&arg)))
	}); err != nil {
		return err
	}
	if errno != 0 {
		return os.NewSyscallError("ioctl VHOST_VSOCK_SET_GUEST_CID", errno)
	}
	return nil
}

// randomCID returns a CID of a guest.
func randomCID() uint32 {
	var b [4]byte
	rand.Read(b[:]) //nolint:errcheck // never fails since Go 1.24
	return minCID + binary.NativeEndian.Uint32(b[:])%(maxCID-minCID+1)
}

// CID is the guest's.
func (v *Vsock) CID() uint32 { return v.cid }

// VhostFile is the open vhost device, for vhostfd=N of the VMM's device. Vsock
// keeps it open; its owner closes it as soon as the VMM has inherited it: only
// then does the VMM's end end the connections. Closing it twice is harmless.
func (v *Vsock) VhostFile() *os.File { return v.vhost }

// Kind is "vhost-vsock".
func (v *Vsock) Kind() string { return "vhost-vsock" }

// GuestParam names the port that the guest dials on CID 2.
func (v *Vsock) GuestParam() string {
	return fmt.Sprintf("husk.channel=vsock:%d", v.port())
}

func (v *Vsock) port() uint32 { return v.listener.Addr().(*vsock.Addr).Port }

// Dial connects to a port in the guest once the guest has connected.
func (v *Vsock) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-v.inbox.first:
	case <-ctx.Done():
		return nil, fmt.Errorf("dial guest port %d: guest has not connected: %w", port, context.Cause(ctx))
	case <-v.done:
	}
	select {
	case <-v.done:
		return nil, fmt.Errorf("dial guest port %d: %w", port, v.err)
	default:
	}
	conn, err := vsock.DialContext(ctx, v.cid, port, nil)
	if err != nil {
		return nil, fmt.Errorf("dial guest: %w", err)
	}
	return conn, nil
}

// Accept waits for the next control connection of the guest.
func (v *Vsock) Accept(ctx context.Context) (net.Conn, error) {
	select {
	case conn := <-v.inbox.conns:
		return conn, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("accept guest: %w", context.Cause(ctx))
	case <-v.done:
		return nil, fmt.Errorf("accept guest: %w", v.err)
	}
}

// Close stops listening and gives up the CID. Connections are not of the
// carrier but of the kernel: they end when the last user of the vhost device
// has closed it, which is the VMM.
func (v *Vsock) Close() error {
	v.listener.Close() //nolint:errcheck // closed before, at the worst
	<-v.done
	v.inbox.drain()
	if v.vhost != nil {
		v.vhost.Close() //nolint:errcheck // closed before, as a rule
	}
	return nil
}

// acceptLoop files its own guest's connections and refuses all others: every
// guest of the host can reach the port. It ends with the listener.
func (v *Vsock) acceptLoop() {
	defer close(v.done)
	for {
		conn, err := v.listener.Accept()
		if err != nil {
			v.err = fmt.Errorf("listen for guest CID %d: %w", v.cid, err)
			return
		}
		if conn.RemoteAddr().(*vsock.Addr).ContextID != v.cid {
			conn.Close() //nolint:errcheck // refused
			continue
		}
		v.inbox.put(conn)
	}
}
