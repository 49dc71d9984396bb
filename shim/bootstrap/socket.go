package bootstrap

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path that fits sockaddr_un with its final NUL.
const maxSocketPath = 107

// socketPath is where the shim of a sandbox listens: one place for each
// containerd, namespace and sandbox.
func socketPath(dir, containerd, namespace, sandbox string) (string, error) {
	sum := sha256.Sum256([]byte(strings.Join([]string{"husk", containerd, namespace, sandbox}, "\x00")))
	path := fmt.Sprintf("%s/%x", dir, sum)
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("socket path %q is longer than %d bytes: give containerd a shorter shim socket directory: %w",
			path, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

// listen makes the socket, in the place of one that nobody serves any more. It
// is AlreadyExists where somebody does.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make socket directory: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		if served(path) {
			return nil, fmt.Errorf("shim socket %s is served by another shim: %w", path, errdefs.ErrAlreadyExists)
		}
		if err := removeSocket(path); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	}
	if err != nil {
		return nil, fmt.Errorf("make shim socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("make shim socket: %w", err), l.Close(), removeSocket(path))
	}
	return l, nil
}

// served tells whether a process listens on the socket.
func served(path string) bool {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return false
	}
	conn.Close() //nolint:errcheck // it was only a question
	return true
}

// removeSocket removes the socket; that it is gone already is no error.
func removeSocket(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove shim socket: %w", err)
	}
	return nil
}
