package channel

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/portmux"
)

// stallTimeout is how long the guest may leave the host's bytes unread before
// its channel is given up. The agent's end always reads: whoever does not is
// hung, or hostile.
const stallTimeout = time.Minute

// A Serial is a virtio-serial port, named "husk.channel" in the guest, over
// which portmux runs.
type Serial struct {
	mux   *portmux.Mux
	guest *os.File
	inbox inbox
	wg    sync.WaitGroup // the accept loop
}

// OpenSerial makes the socket pair between the host and its VMM.
func OpenSerial() (*Serial, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("create socket pair of the guest channel: %w", err)
	}
	guest := os.NewFile(uintptr(fds[1]), "husk.channel")
	host := os.NewFile(uintptr(fds[0]), "husk.channel-host")
	mux, err := portmux.New(stalling{host}, true)
	if err != nil {
		guest.Close() //nolint:errcheck // unused
		return nil, err
	}
	s := &Serial{mux: mux, guest: guest, inbox: newInbox()}
	s.wg.Go(s.acceptLoop)
	return s, nil
}

// GuestFile is the VMM's end, for -chardev socket,fd=N. Serial keeps it open;
// its owner closes it as soon as the VMM has inherited it: only then does the
// VMM's end end the connections. Closing it twice is harmless.
func (s *Serial) GuestFile() *os.File { return s.guest }

// Kind is "virtio-serial".
func (s *Serial) Kind() string { return "virtio-serial" }

// GuestParam is husk.channel=virtio-serial.
func (s *Serial) GuestParam() string { return "husk.channel=virtio-serial" }

// Dial connects to a port in the guest once the guest has spoken: bytes sent to
// a port that the guest has not opened may be lost. A port on which nothing
// listens shows in the first Read, as io.EOF.
func (s *Serial) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-s.inbox.first:
	case <-ctx.Done():
		return nil, fmt.Errorf("dial guest port %d: guest has not connected: %w", port, context.Cause(ctx))
	case <-s.mux.Done():
		return nil, fmt.Errorf("dial guest port %d: %w", port, s.mux.Err())
	}
	conn, err := s.mux.Dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial guest: %w", err)
	}
	return conn, nil
}

// Accept waits for the next control connection of the guest.
func (s *Serial) Accept(ctx context.Context) (net.Conn, error) {
	select {
	case conn := <-s.inbox.conns:
		return conn, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("accept guest: %w", context.Cause(ctx))
	case <-s.mux.Done():
		return nil, fmt.Errorf("accept guest: %w", s.mux.Err())
	}
}

// Close ends every connection of the guest.
func (s *Serial) Close() error {
	s.mux.Close() //nolint:errcheck // always nil
	s.wg.Wait()
	s.guest.Close() //nolint:errcheck // closed before, as a rule
	return nil
}

// acceptLoop files control connections and refuses all others. It ends with the
// Mux.
func (s *Serial) acceptLoop() {
	defer s.inbox.drain()
	for {
		port, conn, err := s.mux.Accept(context.Background())
		if err != nil {
			return
		}
		if port != portmux.ControlPort {
			conn.Close() //nolint:errcheck // refused
			continue
		}
		s.inbox.put(conn)
	}
}

// stalling bounds each write to a file.
type stalling struct{ *os.File }

func (f stalling) Write(b []byte) (int, error) {
	if err := f.SetWriteDeadline(time.Now().Add(stallTimeout)); err != nil {
		return 0, err
	}
	return f.File.Write(b)
}
