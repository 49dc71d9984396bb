package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/shim/pod"
)

// start makes the socket, spawns the daemon, and answers with the address once
// the daemon serves. A member of a pod joins the pod's daemon, and never makes one:
// where that is gone, so is the pod. Its working directory is the bundle.
//
// containerd takes stdout and stderr together for the answer, so nothing else is
// printed.
func (p Program) start(req request, stdin io.Reader, stdout io.Writer) (err error) {
	raw, err := io.ReadAll(io.LimitReader(stdin, maxStdin))
	if err != nil {
		return fmt.Errorf("read start's parameters: %w", err)
	}
	if err := req.readParameters(raw); err != nil {
		return err
	}
	place, err := req.readBundle()
	if err != nil {
		return err
	}
	path, err := socketPath(req.socketDir, req.containerd, req.namespace, place.Sandbox)
	if err != nil {
		return err
	}
	address := "unix://" + path
	answer, err := req.answer(address)
	if err != nil {
		return fmt.Errorf("encode start's answer: %w", err)
	}
	if place.Role == pod.Member {
		if !served(path) {
			return fmt.Errorf("container %q: the shim of its sandbox %q does not answer at %s: the pod has ended, and must be made anew: %w",
				req.id, place.Sandbox, address, errdefs.ErrUnavailable)
		}
		return reply(stdout, address, answer)
	}
	l, err := listen(path)
	switch {
	case errdefs.IsAlreadyExists(err) && hasDaemon("."):
		return reply(stdout, address, answer)
	case err != nil:
		return err
	}
	daemon, err := p.spawn(req, l, address)
	if err != nil {
		return errors.Join(err, removeSocket(path), p.takeBack())
	}
	if err := reply(stdout, address, answer); err != nil {
		// Nobody will ever call it.
		return errors.Join(err, dismiss(daemon, path))
	}
	return nil
}

// takeBack takes back what was made for a daemon that has ended, or was never started.
func (p Program) takeBack() error {
	bundle, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find the bundle: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	return p.Cleanup(ctx, bundle)
}

// dismiss ends the daemon in order, and removes the socket, which is left where
// delete was faster and killed it: delete knows the socket by the address in the
// bundle, which need not be there yet.
func dismiss(daemon *exec.Cmd, path string) error {
	err := daemon.Process.Signal(unix.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	err = errors.Join(err, ignoreExit(daemon.Wait()))
	if served(path) {
		return err // the next shim's of the same name
	}
	return errors.Join(err, removeSocket(path))
}

func ignoreExit(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// reply leaves the address in the bundle and answers containerd. It fails where
// either is gone.
func reply(stdout io.Writer, address string, answer []byte) error {
	// containerd 1.6 and 1.7 find the shim again by this file.
	if err := os.WriteFile("address", []byte(address), 0o600); err != nil {
		return fmt.Errorf("leave the shim's address in the bundle: %w", err)
	}
	// A signal would end this process, and nothing would be undone.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	if _, err := stdout.Write(answer); err != nil {
		return fmt.Errorf("answer containerd: %w", err)
	}
	return nil
}

// spawn starts the daemon in a session and a mount namespace of its own, hands it
// the listener, and waits until it is ready; its error is the daemon's.
func (p Program) spawn(req request, l *net.UnixListener, address string) (*exec.Cmd, error) {
	defer l.Close() //nolint:errcheck // closed before
	socket, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer socket.Close() //nolint:errcheck // closed before
	hostns, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer hostns.Close() //nolint:errcheck // read only
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer r.Close() //nolint:errcheck // read only

	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	cmd := exec.Command(self, req.daemonArgs(address)...)
	cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+req.ttrpc)
	cmd.ExtraFiles = []*os.File{fdSocket - 3: socket, fdReady - 3: w, fdHostNS - 3: hostns}
	cmd.Stderr = w // a panic before the log is open is an error too
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	err = p.launch(req, cmd)
	w.Close() //nolint:errcheck // the daemon has its own
	// Held here, it would answer for a daemon that delete has killed.
	socket.Close() //nolint:errcheck // likewise
	l.Close()      //nolint:errcheck // likewise
	if err != nil {
		return nil, fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	if err := awaitReady(r); err != nil {
		werr := cmd.Wait()
		if err == errDied {
			return nil, fmt.Errorf("%w: %w", err, werr)
		}
		return nil, err
	}
	return cmd, nil
}

// launch starts the daemon's process where it belongs on the host: of a pod by the
// sandbox API only CreateSandbox says where that is.
func (p Program) launch(req request, daemon *exec.Cmd) error {
	if req.hold {
		return daemon.Start()
	}
	bundle, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find the bundle: %w", err)
	}
	return p.Spawn(bundle, daemon)
}

// errDied is when the daemon ended without a word.
var errDied = errors.New("the shim's daemon ended before it was ready")

// awaitReady reads the daemon's word: a final NUL says that it serves, anything
// else is why it does not.
func awaitReady(r io.Reader) error {
	word, err := io.ReadAll(io.LimitReader(r, 64<<10))
	switch {
	case err != nil:
		return fmt.Errorf("wait for the shim's daemon: %w", err)
	case bytes.HasSuffix(word, []byte{0}):
		return nil
	case len(bytes.TrimSpace(word)) == 0:
		return errDied
	}
	return errors.New(strings.TrimSpace(string(word)))
}
