// Package virtiofs runs virtiofsd, the process that serves a host directory to a guest.
package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/child"
	"github.com/husk-containers/husk/internal/hostcheck"
)

const (
	remedy = "install virtiofsd (on Debian 12: apt-get install qemu-system-common), or set hypervisor.virtiofsd"
	// maxFiles is the most descriptors a daemon gets: it holds one for every
	// inode that the guest has in its cache.
	maxFiles = 1_000_000
	// listenFD is the first of the descriptors passed by child.Spec.
	listenFD = 3
)

// Options are what Start needs.
type Options struct {
	// Path of virtiofsd; empty means the usual places, see Find.
	Path string
	// Dir to share, absolute. Mounts made below it later are seen by the guest if
	// the mounts of this process's mount namespace are shared.
	Dir string
	// SocketDir is an existing directory that nobody else may write to; the
	// daemon's socket has a name there for a moment. Empty means the system's
	// for temporary files.
	SocketDir string
	// Cache mode; empty means CacheAuto.
	Cache Cache
	// ThreadPoolSize is how many requests of a guest's queue run at once; zero
	// serves them one by one, without a pool.
	ThreadPoolSize int
	// Started, if not nil, is called right after the process was spawned. Its
	// error fails Start.
	Started func(name string, pid int) error
	// Log is told what the daemon lacks; nil means slog.Default().
	Log *slog.Logger
}

// A Daemon is a running virtiofsd. Its methods are safe for concurrent use.
type Daemon struct {
	child  *child.Child
	socket *os.File

	mu      sync.Mutex
	stopped bool
}

// Find returns the first virtiofsd in the places where distributions put it. The
// error, an errdefs.ErrNotFound, names the remedy.
func Find() (string, error) {
	// Where there are both, the first is Rust's and the last is C's.
	paths := []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"}
	for _, path := range paths {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find virtiofsd in %v: %w: %s", paths, errdefs.ErrNotFound, remedy)
}

// Probe asks a virtiofsd which one it is.
func Probe(ctx context.Context, path string) (Version, error) {
	banner, err := hostcheck.AskVersion(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return Version{}, fmt.Errorf("run %s: %w: %s", path, errdefs.ErrNotFound, remedy)
	}
	if err != nil {
		return Version{}, fmt.Errorf("run %s --version: %w", path, err)
	}
	v, err := parseVersion(banner)
	if err != nil {
		return Version{}, fmt.Errorf("run %s --version: %w: %s", path, err, remedy)
	}
	return v, nil
}

// Start runs a virtiofsd for one directory. ctx bounds the start alone. Whether
// the daemon can serve is not known before its peer has spoken to it: watch Done.
func Start(ctx context.Context, opts Options) (*Daemon, error) {
	d, err := start(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("share %q by virtio-fs: %w", opts.Dir, err)
	}
	return d, nil
}

func start(ctx context.Context, opts Options) (*Daemon, error) {
	spec, err := opts.spec(ctx)
	if err != nil {
		return nil, err
	}
	listener, client, err := connect(opts.SocketDir)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	spec.ExtraFiles = []*os.File{listener}
	c, err := child.Start(spec)
	if err != nil {
		client.Close()
		return nil, err
	}
	d := &Daemon{child: c, socket: client}
	if opts.Started != nil {
		if err := opts.Started("virtiofsd", c.PID()); err != nil {
			return nil, errors.Join(err, d.Stop(ctx))
		}
	}
	return d, nil
}

// spec is the process to run but for its socket.
func (opts Options) spec(ctx context.Context) (child.Spec, error) {
	switch opts.Cache {
	case "":
		opts.Cache = CacheAuto
	case CacheAuto, CacheAlways, CacheNever:
	default:
		return child.Spec{}, fmt.Errorf("cache mode %q is not auto, always or never: %w", opts.Cache, errdefs.ErrInvalidArgument)
	}
	if opts.ThreadPoolSize < 0 {
		return child.Spec{}, fmt.Errorf("thread pool size %d is negative: %w", opts.ThreadPoolSize, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(opts.Dir) {
		return child.Spec{}, fmt.Errorf("directory is not absolute: %w", errdefs.ErrInvalidArgument)
	}
	if info, err := os.Stat(opts.Dir); err != nil {
		return child.Spec{}, err
	} else if !info.IsDir() {
		return child.Spec{}, fmt.Errorf("not a directory: %w", errdefs.ErrInvalidArgument)
	}
	if opts.Path == "" {
		var err error
		if opts.Path, err = Find(); err != nil {
			return child.Spec{}, err
		}
	}
	version, err := Probe(ctx, opts.Path)
	if err != nil {
		return child.Spec{}, err
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return child.Spec{}, fmt.Errorf("read the limit of open files: %w", err)
	}
	var preload string
	if version.Dialect == C {
		if preload, err = FindPreload(); err != nil {
			opts.log().Warn("virtiofsd runs without a correction", "err", err)
		}
	}
	return child.Spec{
		Path: opts.Path,
		Args: version.Dialect.args(params{
			fd: listenFD, dir: opts.Dir, cache: opts.Cache, threadPoolSize: opts.ThreadPoolSize,
			nofile: min(limit.Max, maxFiles),
		}),
		Env: version.Dialect.env(preload),
		// The daemon forks a child for its sandbox. In a pid namespace the kernel
		// ends that one with it, however it ends.
		Namespaces: unix.CLONE_NEWPID,
		NoNewPrivs: true,
		// To make a file, C takes the user's and the group's id, and with them loses
		// what would let it into a directory by a supplementary group: that of an
		// fsGroup. The guest's kernel has checked who may; Rust keeps what it needs.
		KeepCapabilities: version.Dialect == C,
	}, nil
}

func (opts Options) log() *slog.Logger {
	if opts.Log != nil {
		return opts.Log
	}
	return slog.Default()
}

// connect makes the daemon's listening socket with the one connection to it already
// waiting in its queue. The socket has a name for this moment alone, in a directory
// of its own below parent: nobody else can connect to it, and nothing stays there.
func connect(parent string) (listener, client *os.File, err error) {
	defer func() {
		if err != nil {
			listener.Close() // nil is fine
			client.Close()
			listener, client, err = nil, nil, fmt.Errorf("connect a unix socket: %w", err)
		}
	}()
	dir, err := os.MkdirTemp(parent, "husk-virtiofs-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	opened, err := os.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	defer opened.Close()
	// However long the directory's name is, this one fits a socket's address.
	addr := &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/s", opened.Fd())}
	if listener, err = socket("virtiofsd listener"); err != nil {
		return listener, client, err
	}
	if client, err = socket("virtiofsd client"); err != nil {
		return listener, client, err
	}
	if err = unix.Bind(int(listener.Fd()), addr); err != nil {
		return listener, client, err
	}
	if err = unix.Listen(int(listener.Fd()), 1); err != nil {
		return listener, client, err
	}
	return listener, client, unix.Connect(int(client.Fd()), addr)
}

// socket returns a blocking one, which is what both users of it expect.
func socket(name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// PID of the daemon on the host. Ending it ends all of it.
func (d *Daemon) PID() int { return d.child.PID() }

// Socket is the connected vhost-user socket for QEMU's -chardev socket,fd=N. The
// caller closes it once QEMU has a copy, for the daemon ends when the last is
// closed; Stop closes it too.
func (d *Daemon) Socket() *os.File { return d.socket }

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.child.Done() }

// Err says in one line why the daemon ended, after Done: its exit status and its
// last words. It is nil after Stop; any other end is an error.
func (d *Daemon) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil
	}
	switch d.child.Cause() {
	case hypervisor.ErrKilled.Error():
		return fmt.Errorf("virtiofsd ended: %w", hypervisor.ErrKilled)
	case helperLost:
		return fmt.Errorf("virtiofsd ended: %s without a word; the process of it that serves was perhaps %w", helperLost, hypervisor.ErrKilled)
	}
	return fmt.Errorf("virtiofsd ended: %s", d.child.Cause())
}

// helperLost is how C ends when its own child, which serves, was killed: the signal it does
// not pass on, and other errors it tells.
const helperLost = "exit status 1"

// Killed tells, after Done, whether a signal ended the daemon or its child; of itself it ends
// when its peer does.
func (d *Daemon) Killed() bool {
	return strings.HasPrefix(d.child.Status(), "killed by") || d.child.Cause() == helperLost
}

// Stop ends the daemon. It is killed: all that it has answered is in the host's
// file system. Stop is idempotent.
func (d *Daemon) Stop(ctx context.Context) error {
	d.mu.Lock()
	select {
	case <-d.child.Done(): // of itself: Err tells
	default:
		d.stopped = true
	}
	d.mu.Unlock()
	d.socket.Close()
	return d.child.Stop(ctx, syscall.SIGKILL)
}
