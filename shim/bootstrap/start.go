package bootstrap

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// sandboxAnnotation is how CRI names the pod that a container belongs to.
const sandboxAnnotation = "io.kubernetes.cri.sandbox-id"

// start makes the socket, spawns the daemon, and answers with the address once
// the daemon serves. Containers of one pod share a shim: where the pod's answers
// already, there is nothing to spawn. Its working directory is the bundle.
//
// containerd takes stdout and stderr together for the answer, so nothing else is
// printed.
func start(req request, stdin io.Reader, stdout io.Writer) (err error) {
	raw, err := io.ReadAll(io.LimitReader(stdin, maxStdin))
	if err != nil {
		return fmt.Errorf("read start's parameters: %w", err)
	}
	if err := req.readParameters(raw); err != nil {
		return err
	}
	sandbox, err := sandboxOf("config.json", req.id)
	if err != nil {
		return err
	}
	path, err := socketPath(req.socketDir, req.containerd, req.namespace, sandbox)
	if err != nil {
		return err
	}
	address := "unix://" + path
	answer, err := req.answer(address)
	if err != nil {
		return fmt.Errorf("encode start's answer: %w", err)
	}
	l, err := listen(path)
	switch {
	case errdefs.IsAlreadyExists(err):
	case err != nil:
		return err
	default:
		defer l.Close() //nolint:errcheck // the daemon has its own
		if err := spawn(req, l, address); err != nil {
			return errors.Join(err, removeSocket(path))
		}
	}
	// containerd 1.6 and 1.7 find the shim again by this file.
	if err := os.WriteFile("address", []byte(address), 0o600); err != nil {
		return err
	}
	_, err = stdout.Write(answer)
	return err
}

// sandboxOf returns the id of the pod that the bundle's container belongs to, or
// id where it is in none.
func sandboxOf(specPath, id string) (string, error) {
	raw, err := os.ReadFile(specPath)
	if err != nil {
		return "", fmt.Errorf("read the bundle's spec: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &spec); err != nil {
		return "", fmt.Errorf("decode the bundle's %s: %w", specPath, err)
	}
	if sandbox := spec.Annotations[sandboxAnnotation]; sandbox != "" {
		return sandbox, nil
	}
	return id, nil
}

// spawn starts the daemon in a session and a mount namespace of its own and
// waits until it is ready; its error is the daemon's.
func spawn(req request, l *net.UnixListener, address string) error {
	socket, err := l.File()
	if err != nil {
		return fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer socket.Close() //nolint:errcheck // the daemon has its own
	hostns, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer hostns.Close() //nolint:errcheck // read only
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	defer r.Close() //nolint:errcheck // read only

	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	cmd := exec.Command(self, req.daemonArgs(address)...)
	cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+req.ttrpc)
	cmd.ExtraFiles = []*os.File{fdSocket - 3: socket, fdReady - 3: w, fdHostNS - 3: hostns}
	cmd.Stderr = w // a panic before the log is open is an error too
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	err = cmd.Start()
	w.Close() //nolint:errcheck // the daemon has its own
	if err != nil {
		return fmt.Errorf("spawn the shim's daemon: %w", err)
	}
	if err := awaitReady(r); err != nil {
		werr := cmd.Wait()
		if err == errDied {
			return fmt.Errorf("%w: %w", err, werr)
		}
		return err
	}
	return os.WriteFile("shim.pid", []byte(strconv.Itoa(cmd.Process.Pid)), 0o644)
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
