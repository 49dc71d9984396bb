// Package sockets carries connections from containers to unix sockets of the host:
// each socket has one in the guest that stands for it.
package sockets

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/record"
)

const (
	// maxSockets bounds the sockets of a sandbox.
	maxSockets = 1000
	// maxConnections bounds the open connections of a sandbox, and maxPerSocket
	// those of one socket. Further ones wait in the guest.
	maxConnections = 512
	maxPerSocket   = 256
	// maxReported bounds the connections of one socket that the guest has told of
	// and that wait here. An agent as we know it has no more waiting.
	maxReported = 64
)

// A Guest is the VM's; guest.Guest is one.
type Guest interface {
	Call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Lost tells whether an error of Call means that the guest is gone.
	Lost(err error) bool
}

// A Host finds sockets; hostns.Namespace is one.
type Host interface {
	Resolve(path string) (string, error)
	Open(path string) (*os.File, error)
}

// Options is what a table is made of.
type Options struct {
	Guest  Guest
	Host   Host
	Record *record.Record
	// Allowed are the patterns of runtime.allowed_sockets.
	Allowed []string
	Log     *slog.Logger
}

// A Socket is one of the host that a container has.
type Socket struct {
	// Container is the container's id. User is its first process's and CgroupsPath
	// its spec's (empty: the shim's cgroup): connections are made in that name. They
	// are the same for all sockets of a container.
	Container   string
	User        specs.User
	CgroupsPath string
	// Path on the host.
	Path string
	// Over is the guest path at which the host's own is seen, in a directory that the
	// guest shares; empty: none.
	Over string
}

// A Table holds the sockets of a sandbox. Its methods are safe for concurrent use.
//
//	container ─ connect ─> agent ─ SocketEvent ─> Event ─> a queue for each socket
//	                                                          │ while there are slots
//	  dialer, in the container's cgroup ── connect ──> host's socket
//	                                                          │
//	container <──────── agent <─── claim, frames ──────────> Copy
type Table struct {
	opts   Options
	slots  chan struct{}   // one for each open connection
	ctx    context.Context //nolint:containedctx // the table's own lifetime
	cancel context.CancelFunc
	work   sync.WaitGroup // of the sockets

	// mu guards what is below, and the fields that say so. It is not held over a call
	// that can block.
	mu         sync.Mutex
	closed     bool
	last       int
	sockets    map[string]*socket
	containers map[string]*container
}

// New returns a table without a socket.
func New(o Options) *Table {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	t := &Table{
		opts: o, slots: make(chan struct{}, maxConnections),
		sockets: map[string]*socket{}, containers: map[string]*container{},
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// Add gives a container a socket, and returns the guest path of the one that stands
// for it, which a bind mount may have as its source, and what takes it away again.
// The guest is running. Connections that are open then stay open until
// RemoveContainer, as on a host they outlive their socket's name.
//
// Added again with the same path and the same Over it is the same one, with the mode
// and owner that the host's has now, and mounted over it anew where that is another
// file. Containers that share a directory share its sockets (the same path and the
// same Over): then the guest tells whose process has connected. Each adds them for
// itself.
//
// The error is NotFound where there is nothing on the host, InvalidArgument where
// there is no socket, and PermissionDenied where the configuration does not allow it.
func (t *Table) Add(ctx context.Context, s Socket) (guestPath string, remove func(context.Context) error, err error) {
	guestPath, remove, err = t.add(ctx, s)
	if err != nil {
		return "", nil, fmt.Errorf("socket %s: %w", s.Path, err)
	}
	return guestPath, remove, nil
}

func (t *Table) add(ctx context.Context, s Socket) (string, func(context.Context) error, error) {
	path, err := t.opts.Host.Resolve(s.Path)
	if errors.Is(err, os.ErrNotExist) {
		err = errors.Join(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", nil, err
	}
	if err := check(t.opts.Allowed, s.Path, path); err != nil {
		return "", nil, err
	}
	file, st, err := t.open(path)
	if err != nil {
		return "", nil, err
	}
	file.Close() //nolint:errcheck // nothing was written
	c, err := t.join(s)
	if err != nil {
		return "", nil, err
	}
	if err := c.begin(ctx); err != nil {
		return "", nil, err
	}
	defer c.end()
	if err := c.start(ctx, s); err != nil {
		return "", nil, err
	}
	sock, err := t.register(c, s, path)
	if err != nil {
		return "", nil, err
	}
	remove := func(ctx context.Context) error {
		if err := c.begin(ctx); err != nil {
			return err
		}
		defer c.end()
		return t.remove(ctx, sock, c)
	}
	err = t.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.ListenSocket(ctx, &agentv1.ListenSocketRequest{
			SocketId: sock.id, Target: sock.guestPath(), Mode: st.Mode &^ unix.S_IFMT, Uid: st.Uid, Gid: st.Gid, Over: s.Over,
		})
		return err
	})
	if err != nil {
		return "", nil, errors.Join(err, t.remove(ctx, sock, c))
	}
	return sock.guestPath(), remove, nil
}

// open opens what a resolved path leads to, which is a socket.
func (t *Table) open(path string) (*os.File, *unix.Stat_t, error) {
	file, err := t.opts.Host.Open(path)
	if err != nil {
		return nil, nil, err
	}
	var st unix.Stat_t
	err = os.NewSyscallError("fstat", unix.Fstat(int(file.Fd()), &st))
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		err = fmt.Errorf("%s is no socket: %w", path, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	return file, &st, nil
}

// register makes the socket known, so that no event of it comes too early, and
// begins to serve it. One that is there already is returned: the container's own, or,
// where it lies over the host's, that of all who share the directory. It is the
// container's turn.
func (t *Table) register(c *container, s Socket, path string) (*socket, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, sock := range t.sockets {
		if sock.path == path && sock.over == s.Over && (s.Over != "" || sock.owners[c.id] == c) {
			sock.owners[c.id] = c
			return sock, nil
		}
	}
	switch {
	case t.closed:
		return nil, fmt.Errorf("the sandbox is being stopped: %w", errdefs.ErrFailedPrecondition)
	case len(t.sockets) >= maxSockets:
		return nil, fmt.Errorf("the sandbox has %d sockets of the host already: %w", maxSockets, errdefs.ErrResourceExhausted)
	}
	t.last++
	sock := &socket{
		table: t, owners: map[string]*container{c.id: c}, id: "s" + strconv.Itoa(t.last), path: path, over: s.Over,
		reported: make(chan report, maxReported), slots: make(chan struct{}, maxPerSocket),
		dials: make(chan struct{}, maxDials), end: make(chan struct{}),
	}
	t.sockets[sock.id] = sock
	t.work.Go(sock.serve)
	return sock, nil
}

// remove takes a socket from a container, and away with its last. It is idempotent.
func (t *Table) remove(ctx context.Context, s *socket, c *container) error {
	t.mu.Lock()
	if s.owners[c.id] == c {
		delete(s.owners, c.id)
	}
	last := len(s.owners) == 0 && t.sockets[s.id] == s
	if last {
		delete(t.sockets, s.id)
	}
	t.mu.Unlock()
	if !last {
		return nil
	}
	close(s.end)
	err := t.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.CloseSocket(ctx, &agentv1.CloseSocketRequest{SocketId: s.id})
		return err
	})
	if err != nil && !t.opts.Guest.Lost(err) {
		return fmt.Errorf("take socket %s away: %w", s.path, err)
	}
	return nil
}

// Event takes the guest's word that something has connected to a socket. It does not
// block; what it does not know it ignores.
func (t *Table) Event(e *agentv1.SocketEvent) {
	t.mu.Lock()
	s := t.sockets[e.GetSocketId()]
	t.mu.Unlock()
	if s == nil || e.GetConnection() == 0 {
		return // it has been taken away, or never was
	}
	select {
	case s.reported <- report{e.GetConnection(), e.GetContainerId()}:
	default:
		s.complain(e.GetContainerId(), errors.New("the guest reports more connections than can be waiting"))
	}
}

// RemoveContainer takes all sockets of a container away, ends their connections, and
// the process that made them, and removes its cgroup. One without sockets is no
// error.
func (t *Table) RemoveContainer(ctx context.Context, id string) error {
	t.mu.Lock()
	c := t.containers[id]
	t.mu.Unlock()
	if c == nil {
		return nil
	}
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.end()
	t.mu.Lock()
	var own []*socket
	for _, s := range t.sockets {
		if s.owners[c.id] == c {
			own = append(own, s)
		}
	}
	if t.containers[id] == c {
		delete(t.containers, id)
	}
	t.mu.Unlock()
	c.cancel()
	var errs []error
	for _, s := range own {
		errs = append(errs, t.remove(ctx, s, c))
	}
	return errors.Join(append(errs, c.stop(ctx))...)
}

// Close takes everything away; nothing can be added any more.
func (t *Table) Close(ctx context.Context) error {
	t.mu.Lock()
	t.closed = true
	ids := make([]string, 0, len(t.containers))
	for id := range t.containers {
		ids = append(ids, id)
	}
	t.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, t.RemoveContainer(ctx, id))
	}
	t.cancel()
	if err := errors.Join(errs...); err != nil {
		return err // then something of them may still go on
	}
	t.work.Wait()
	return nil
}
