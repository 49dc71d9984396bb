// Package daemon runs private containerds for tests: own root, state and socket
// in a scratch directory, torn down with proof that nothing is left.
package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/images"
)

const (
	startTimeout = time.Minute
	stopTimeout  = 30 * time.Second
)

// Config is what a Daemon needs.
type Config struct {
	Generation Generation
	// Scratch is the directory to make the daemon's own in. It is short, for a
	// unix socket's path has at most 107 bytes, and its file system carries an
	// overlay's upper layer. Empty: /tmp.
	Scratch string
	// Root is the repository's, whose build/bin is searched first for shims.
	Root string
	// CRI has containerd serve CRI too, in a network namespace of its own; nil
	// leaves it out.
	CRI *CRI
}

// A Daemon is a running private containerd. Its methods are for one goroutine,
// except Ctr.
type Daemon struct {
	// Token is a word of this daemon's own: the containerd namespace but for CRI, and part
	// of the name of all that ID names. What is left is found by it.
	Token string
	// Dir is the scratch directory.
	Dir string

	cfg        Config
	supervisor *supervisor
	pid        int // of containerd; 0 while stopped
}

// Start starts a containerd with Husk configured for it, and imports the busybox
// image. Supervise must have been called before.
func Start(ctx context.Context, cfg Config) (*Daemon, error) {
	if cfg.Scratch == "" {
		cfg.Scratch = os.TempDir()
	}
	random := make([]byte, 4)
	rand.Read(random) // never fails
	token := "hk" + hex.EncodeToString(random)
	d := &Daemon{Token: token, Dir: filepath.Join(cfg.Scratch, token), cfg: cfg}
	if err := os.Mkdir(d.Dir, 0o711); err != nil {
		return nil, fmt.Errorf("make scratch directory: %w", err)
	}
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, d.abandon())
	}
	return d, nil
}

func (d *Daemon) start(ctx context.Context) error {
	if err := d.prepareCRI(); err != nil {
		return err
	}
	if err := os.WriteFile(d.file("containerd.toml"), d.configuration(), 0o600); err != nil {
		return fmt.Errorf("write containerd's configuration: %w", err)
	}
	if err := d.Configure(nil); err != nil {
		return err
	}
	s, err := startSupervisor(d.cfg.CRI != nil)
	if err != nil {
		return err
	}
	d.supervisor = s
	if err := d.Resume(ctx); err != nil {
		return err
	}
	if d.cfg.CRI != nil {
		if err := d.importImage(ctx, images.WritePause); err != nil {
			return err
		}
	}
	return d.importImage(ctx, images.WriteBusybox)
}

// Resume starts containerd again after Stop, and returns when it serves.
func (d *Daemon) Resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	notify := d.file("notify.sock")
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("listen for readiness: %w", err)
	}
	defer os.Remove(notify)
	defer ready.Close()
	path := []string{filepath.Join(d.cfg.Root, "build", "bin"), filepath.Dir(d.cfg.Generation.Containerd), os.Getenv("PATH")}
	// Of two values for a name, the first would count.
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "PATH=") })
	env = append(env, "PATH="+strings.Join(path, ":"), "NOTIFY_SOCKET="+notify, "HUSK_CONFIG="+d.huskConfig())
	d.pid, err = d.supervisor.start(launch{
		Args: []string{d.cfg.Generation.Containerd, "--config", d.file("containerd.toml")},
		Env:  env,
		Log:  d.file("containerd.log"),
	})
	if err != nil {
		return err
	}
	exited := make(chan error, 1)
	wait, stop := context.WithCancel(ctx)
	defer stop()
	go func() { // ends with containerd or the deadline of ctx
		exited <- WaitExit(wait, d.pid)
		ready.SetReadDeadline(time.Unix(1, 0))
	}()
	message := make([]byte, 4096)
	for {
		n, err := ready.Read(message)
		if err != nil {
			return fmt.Errorf("wait for containerd %s: it ended or was not ready in %v: %w; its log ends:\n%s",
				d.cfg.Generation.Name, startTimeout, err, d.Log(20))
		}
		if strings.Contains(string(message[:n]), "READY=1") {
			return nil
		}
	}
}

// Stop ends containerd alone; shims and containers go on.
func (d *Daemon) Stop(ctx context.Context) error { return d.end(ctx, unix.SIGTERM) }

// Kill is Stop without a warning.
func (d *Daemon) Kill(ctx context.Context) error { return d.end(ctx, unix.SIGKILL) }

func (d *Daemon) end(ctx context.Context, signal unix.Signal) error {
	if d.pid == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := unix.Kill(d.pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop containerd: %w", err)
	}
	if err := WaitExit(ctx, d.pid); err != nil {
		return fmt.Errorf("stop containerd: %w", err)
	}
	d.pid = 0
	return nil
}

// Address is the socket that containerd serves, CRI on it too.
func (d *Daemon) Address() string { return d.file("c.sock") }

// Ctr is a ctr command for this containerd, in the namespace Token, or in CRI's.
func (d *Daemon) Ctr(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.cfg.Generation.Ctr,
		append([]string{"--address", d.Address(), "--namespace", d.namespace()}, args...)...)
	// A ctr that is stuck must not hold the caller by a pipe it gave away.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// ID is a container id that starts with name and is this daemon's alone.
func (d *Daemon) ID(name string) string { return name + "-" + d.Token }

// FIFODir is where ctr is to put FIFOs.
func (d *Daemon) FIFODir() string { return d.file("fifo") }

// Processes lists what containerd and its shims have started and still runs,
// in whatever process group or session; containerd itself is not among it.
func (d *Daemon) Processes() ([]Process, error) {
	below, err := Descendants(d.supervisor.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	var list []Process
	for _, p := range below {
		if p.PID != d.pid {
			list = append(list, p)
		}
	}
	return list, nil
}

// Log is the last lines of what containerd and the shims logged, without those
// in which plugins say that they are there.
func (d *Daemon) Log(lines int) string {
	data, err := os.ReadFile(d.file("containerd.log"))
	if err != nil {
		return err.Error()
	}
	all := slices.DeleteFunc(strings.SplitAfter(string(data), "\n"), func(line string) bool {
		return strings.Contains(line, "loading plugin")
	})
	return strings.Join(all[max(0, len(all)-lines-1):], "")
}

func (d *Daemon) importImage(ctx context.Context, write func(io.Writer) error) error {
	archive := d.file("image.tar")
	f, err := os.Create(archive)
	if err != nil {
		return fmt.Errorf("create image archive: %w", err)
	}
	defer os.Remove(archive)
	if err := errors.Join(write(f), f.Close()); err != nil {
		return fmt.Errorf("write image archive: %w", err)
	}
	if out, err := d.Ctr(ctx, "image", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("import image: %w: %s", err, out)
	}
	return nil
}

func (d *Daemon) file(name string) string { return filepath.Join(d.Dir, name) }
