package channel

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	guestchannel "github.com/husk-containers/husk/agent/channel"
)

func TestClaimCID(t *testing.T) {
	for _, c := range []struct {
		name  string
		inUse int // claims that meet a CID in use
		err   error
		tries int
	}{
		{"free", 0, nil, 1},
		{"one in use", 1, nil, 2},
		{"all in use", claimAttempts, unix.EADDRINUSE, claimAttempts},
		{"refused", 0, unix.EPERM, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			tries := 0
			cid, err := claimCID(func() uint32 { return uint32(tries) + minCID }, func(uint32) error {
				tries++
				if tries <= c.inUse {
					return unix.EADDRINUSE
				}
				return c.err
			})
			if !errors.Is(err, c.err) || tries != c.tries {
				t.Errorf("%v after %d tries", err, tries)
			}
			if err == nil && cid != uint32(c.tries-1)+minCID {
				t.Errorf("returned CID %d, which is not the one claimed", cid)
			}
		})
	}
}

func TestRandomCID(t *testing.T) {
	for range 10000 {
		if cid := randomCID(); cid < minCID || cid > maxCID {
			t.Fatal(cid)
		}
	}
}

func TestVsockUsable(t *testing.T) {
	err := VsockUsable()
	if err != nil && !strings.Contains(err.Error(), "modprobe") {
		t.Errorf("no remedy in %q", err)
	}
	if _, openErr := OpenVsock(); (openErr == nil) != (err == nil) {
		t.Errorf("VsockUsable says %v, OpenVsock %v", err, openErr)
	}
}

// Two claims of one CID exclude each other, and what the VMM does with the
// device afterwards works: become its owner and set the same CID again.
func TestVsockClaim(t *testing.T) {
	if err := VsockUsable(); err != nil {
		t.Skip(err)
	}
	v, err := OpenVsock()
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	other, err := openVhost()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := claim(other, v.CID()); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("second claim of a CID: %v", err)
	}
	const setOwner = 0xAF01 // VHOST_SET_OWNER
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, v.VhostFile().Fd(), setOwner, 0); errno != 0 {
		t.Errorf("VHOST_SET_OWNER after the claim: %v", errno)
	}
	if err := claim(v.VhostFile(), v.CID()); err != nil {
		t.Errorf("the owner's claim of the same CID: %v", err)
	}
	if want := "husk.channel=vsock:"; !strings.HasPrefix(v.GuestParam(), want) {
		t.Errorf("GuestParam %q", v.GuestParam())
	}
	cid := v.CID()
	v.Close()
	if err := claim(other, cid); err != nil {
		t.Errorf("claim of a CID that was given up: %v", err)
	}
}

func TestVsockRefusesForeignCIDs(t *testing.T) {
	requireVsock(t)
	const foreign = 77
	host, err := newVsock(nil, foreign, vsock.Local)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	conn, err := guestchannel.NewVsock(vsock.Local, host.port()).DialControl(testContext(t))
	if err == nil {
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("read from a host that should not know us")
		}
	}
	select {
	case <-host.inbox.conns:
		t.Error("accepted a foreign CID")
	default:
	}

	guest := guestchannel.NewVsock(foreign, 1)
	defer guest.Close()
	l, err := guest.Listen(testPort)
	if err != nil {
		t.Fatal(err)
	}
	go l.Accept()
	c, err := vsock.Dial(vsock.Local, testPort, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.ErrNoProgress) {
		t.Errorf("guest kept a connection from a foreign CID: %v", err)
	}
}
