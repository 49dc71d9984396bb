package channel

import (
	"context"
	"net"
	"sync"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// hostCID is the host's address on every guest's vsock.
const hostCID uint32 = vsock.Host

// vsockCarrier is the kernel's vsock.
type vsockCarrier struct {
	host, port uint32

	mu        sync.Mutex
	listeners []net.Listener
}

// NewVsock returns the channel to the host with the given CID, which listens on
// port. Only connections from that CID are accepted.
func NewVsock(host, port uint32) *Channel {
	return &Channel{carrier: &vsockCarrier{host: host, port: port}}
}

func (v *vsockCarrier) dialControl(ctx context.Context) (net.Conn, error) {
	conn, err := vsock.DialContext(ctx, v.host, v.port, nil)
	if err != nil {
		return nil, err // a nil *vsock.Conn must not become a net.Conn
	}
	return conn, nil
}

func (v *vsockCarrier) listen(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, err
	}
	hl := hostListener{l, v.host}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.listeners = append(v.listeners, hl)
	return hl, nil
}

func (v *vsockCarrier) close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, l := range v.listeners {
		l.Close() //nolint:errcheck // closed before, at the worst
	}
	v.listeners = nil
	return nil
}

// A hostListener accepts connections from one CID only: containers in the guest
// reach the agent's ports as well.
type hostListener struct {
	*vsock.Listener
	host uint32
}

func (l hostListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if conn.RemoteAddr().(*vsock.Addr).ContextID == l.host {
			return conn, nil
		}
		conn.Close() //nolint:errcheck // refused
	}
}
