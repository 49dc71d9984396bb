package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"

	containerdlog "github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/hostns"
)

// What start hands to the daemon.
const (
	fdSocket = 3 + iota
	fdReady
	fdHostNS
)

// A Daemon is the shim that start left behind.
type Daemon struct {
	// ID, Namespace and Bundle are of the container that it was started for.
	ID, Namespace, Bundle string
	// Hold is set where it was started for a pod by the sandbox API, whose bundle
	// may hold no spec, or any.
	Hold bool
	// ConfigPath is from the runtime's options; empty where they name no file.
	ConfigPath string
	// EventsPath is the socket on which containerd takes events.
	EventsPath string
	// Level of the log, Debug where containerd's is. It may be changed.
	Level *slog.LevelVar
	// Listener is the socket that containerd connects to, which it may have done
	// already.
	Listener net.Listener
	// Host is the host's mount namespace: the daemon has its own.
	Host *hostns.Namespace

	ready func() error
}

// Ready lets start answer containerd. An error means that start is gone, so
// nobody will ever call.
func (d *Daemon) Ready() error { return d.ready() }

// A listener can take its socket's name away while it still serves, once, and the
// shim off the bundle's record: from then on the name may be another shim's.
type listener struct {
	net.Listener
	unlink func() error
}

// Unlink removes the socket and the record from the file system.
func (l *listener) Unlink() error { return l.unlink() }

// Leave has the daemon outlive its bundle, which containerd is about to delete: from
// then on delete takes it for ended in order.
func (*Daemon) Leave() error { return signOut() }

// daemon is the process that serves; its working directory is the bundle.
func (p Program) daemon(req request) (err error) {
	// Writes to a FIFO or socket that its reader has left fail; they must not
	// kill. Unlike an ignored signal, a caught one is back to its default in
	// the processes that the daemon runs.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()

	for fd := fdSocket; fd <= fdHostNS; fd++ {
		unix.CloseOnExec(fd)
	}
	path := strings.TrimPrefix(req.socket, "unix://")
	// delete, which comes at any time from then on, has nothing to end.
	unlink := sync.OnceValue(func() error { return errors.Join(signOut(), removeSocket(path)) })
	defer func() { err = errors.Join(err, unlink()) }()
	socket := os.NewFile(fdSocket, "socket")
	inherited, err := net.FileListener(socket)
	if err != nil {
		return fmt.Errorf("take over the shim's socket: %w", err)
	}
	l := &listener{inherited, unlink}
	defer l.Close() //nolint:errcheck // Serve may have closed it
	if err := socket.Close(); err != nil {
		return fmt.Errorf("take over the shim's socket: %w", err)
	}
	bundle, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find the bundle: %w", err)
	}
	if err := signIn(); err != nil {
		return err
	}
	if err := ownMounts(); err != nil {
		return err
	}
	d := &Daemon{
		ID: req.id, Namespace: req.namespace, Bundle: bundle, Hold: req.hold, ConfigPath: req.config, EventsPath: req.eventsPath(),
		Level: new(slog.LevelVar), Listener: l, Host: hostns.New(os.NewFile(fdHostNS, "host mount namespace")),
	}
	defer d.Host.Close() //nolint:errcheck // read only
	if req.debug {
		d.Level.Set(slog.LevelDebug)
	}
	ready := os.NewFile(fdReady, "ready")
	defer ready.Close() //nolint:errcheck // Ready has closed it
	log, err := openLog("log")
	if err != nil {
		return err
	}
	// Libraries have a log of their own. By ttrpc's a guest could fill ours.
	if err := containerdlog.SetLevel("fatal"); err != nil {
		return err
	}
	slog.SetDefault(slog.New(log.handler(d.Level)).With("sandbox", req.id))
	if err := yieldToOOM(); err != nil {
		slog.Warn("cannot make the shim a better choice for the OOM killer than containerd", "err", err)
	}
	d.ready = sync.OnceValue(func() error {
		// Until here, stderr is the pipe too.
		_, err := ready.Write([]byte{0})
		return errors.Join(err, log.takeStderr(), ready.Close())
	})
	if err := p.Serve(ctx, d); err != nil {
		// Before Ready this reaches start; after it the pipe is closed.
		fmt.Fprint(ready, oneLine(err)) //nolint:errcheck // the log has it as well
		slog.Error("shim ends", "err", err)
		return errTold
	}
	return nil
}

// ownMounts makes the mount namespace that start made follow the host's, but
// not the other way, and be followed by those that the daemon's children make.
func ownMounts() error {
	for _, flag := range []uintptr{unix.MS_SLAVE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|flag, ""); err != nil {
			return fmt.Errorf("set the propagation of the shim's mounts: %w", err)
		}
	}
	return nil
}

// yieldToOOM makes the kernel prefer the shim and what it runs to containerd,
// whose score it inherited, when memory is short.
func yieldToOOM() error {
	const path, worst = "/proc/self/oom_score_adj", 1000
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	return os.WriteFile(path, []byte(strconv.Itoa(min(score+1, worst))), 0o644)
}
