// Package usernet runs passt, the process that carries a guest's packets to the
// host's network through ordinary sockets of an unprivileged account.
package usernet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/child"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	remedy = "install passt (on Debian: apt-get install passt), or set network.passt"
	// streamFD is the first of the descriptors passed by child.Spec.
	streamFD = 3
	// nobody is the uid and gid that passt takes by itself where root starts it.
	// It is started with them, for a change of uid undoes the parent-death signal.
	nobody = 65534
)

// Options are what Start needs.
type Options struct {
	// Passt is its path; empty means the usual places, see Find.
	Passt string
	// MAC of the guest's interface, a unicast address of six bytes.
	MAC net.HardwareAddr
	// MTU of the guest's interface, 1280 to 65520; zero means 65520, with which
	// bulk transfers are fastest. It is of no concern to the host's network: passt
	// moves the bytes of streams, and has the host's kernel cut datagrams.
	MTU int
	// Started, if not nil, is called right after the process was spawned. Its error
	// fails Start.
	Started func(hypervisor.Process) error
}

// A Network is a running passt with one guest. Its methods are safe for concurrent
// use.
type Network struct {
	child  *child.Child
	stream *os.File
	plan   plan

	mu     sync.Mutex
	closed bool
}

// Find returns the first passt in the places where programs are installed. The
// error, an errdefs.ErrNotFound, names the remedy.
func Find() (string, error) {
	paths := []string{"/usr/bin/passt", "/usr/local/bin/passt"}
	for _, path := range paths {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find passt in %v: %w: %s", paths, errdefs.ErrNotFound, remedy)
}

// Start runs passt in this process's network namespace, which is the one that the
// guest reaches. It has returned once passt answers; ctx bounds that alone.
//
// passt needs a kernel that lets an unprivileged account make user namespaces
// (sysctl user.max_user_namespaces), for its sandbox: empty mount, IPC and UTS
// namespaces, no capabilities, seccomp. Nothing of it has a name on the host.
func Start(ctx context.Context, opts Options) (*Network, error) {
	n, err := start(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("start user-mode networking: %w", err)
	}
	return n, nil
}

func start(ctx context.Context, opts Options) (*Network, error) {
	p, err := opts.plan()
	if err != nil {
		return nil, err
	}
	if opts.Passt == "" {
		if opts.Passt, err = Find(); err != nil {
			return nil, err
		}
	} else if _, err := os.Stat(opts.Passt); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("run %s: %w: %s", opts.Passt, errdefs.ErrNotFound, remedy)
	}
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	c, err := child.Start(child.Spec{
		Path: opts.Passt, Args: p.args(),
		UID: nobody, GID: nobody,
		// In a pid namespace it can signal no other process of its account.
		Namespaces: unix.CLONE_NEWPID,
		NoNewPrivs: true,
		ExtraFiles: []*os.File{theirs},
	})
	if err != nil {
		ours.Close()
		return nil, err
	}
	n := &Network{child: c, stream: ours, plan: p}
	if opts.Started != nil {
		err = opts.Started(hypervisor.Process{Name: "passt", PID: c.PID()})
	}
	if err == nil {
		theirs.Close() // passt's copy is the last: its end is our EOF
		err = n.awaitAnswer(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, n.Close(ctx))
	}
	return n, nil
}

// socketpair returns a connection of which passt gets the second end. Ours does
// not block, so that reading it can be given up.
func socketpair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fds[0], true)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "guest's end"), os.NewFile(uintptr(fds[1]), "passt's end"), nil
}

// NIC is the guest's interface, for Config.Devices or VM.Attach. Its Stream may be
// closed once the VM has a copy, for passt ends when the last is closed; Close
// closes it too.
func (n *Network) NIC() hypervisor.NIC {
	return hypervisor.NIC{ID: "usernet", MAC: n.plan.mac, MTU: n.plan.mtu, Stream: n.stream}
}

// Guest is what the guest is to make of the interface.
func (n *Network) Guest() *agentv1.Network { return n.plan.guest() }

// Done is closed when passt has ended.
func (n *Network) Done() <-chan struct{} { return n.child.Done() }

// Err says in one line why passt ended, after Done: its exit status and its last
// words. It is nil after Close; any other end is an error.
func (n *Network) Err() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	return fmt.Errorf("passt ended: %s", n.child.Cause())
}

// Killed tells, after Done, whether a signal ended passt; of itself it ends when
// its guest's VM does.
func (n *Network) Killed() bool { return strings.HasPrefix(n.child.Status(), "killed by") }

// Close ends passt, which cuts the guest's connections. It is idempotent.
func (n *Network) Close(ctx context.Context) error {
	n.mu.Lock()
	select {
	case <-n.child.Done(): // of itself: Err tells
	default:
		n.closed = true
	}
	n.mu.Unlock()
	n.stream.Close()
	return n.child.Stop(ctx, syscall.SIGKILL)
}
