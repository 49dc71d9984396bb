package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// cleanupTimeout is below the 5 s that containerd gives to delete.
const cleanupTimeout = 4500 * time.Millisecond

// InitPIDFile is where the task service keeps a task's pid in the bundle, for
// delete to report.
const InitPIDFile = "init.pid"

// delete takes back what a daemon left of a bundle, and the daemon itself, which
// after an orderly end is nothing, and tells containerd that the task was killed.
// The bundle of a pod's member has no daemon, and nothing to take back. What goes wrong is a
// warning: containerd removes the bundle only after an answer.
func (p Program) delete(req request, stdout io.Writer) error {
	bundle := req.bundle
	if bundle == "" {
		wd, err := os.Getwd()
		if err != nil {
			return fmt.Errorf("find the bundle: %w", err)
		}
		bundle = wd
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	// The shim comes first: it may not make anew what is being taken back.
	for _, err := range []error{killShim(bundle), p.Cleanup(ctx, bundle), forgetSocket(bundle)} {
		if err != nil {
			fmt.Fprintln(os.Stderr, oneLine(err)) //nolint:errcheck // nothing else could tell
		}
	}
	raw, err := proto.Marshal(&task.DeleteResponse{
		Pid:        readPID(filepath.Join(bundle, InitPIDFile)),
		ExitStatus: 128 + uint32(unix.SIGKILL),
		ExitedAt:   timestamppb.Now(),
	})
	if err != nil {
		return fmt.Errorf("encode delete's answer: %w", err)
	}
	_, err = stdout.Write(raw)
	return err
}

// forgetSocket removes the socket of a shim that is gone. A shim that answers is
// the pod's of which the bundle is a member's.
func forgetSocket(bundle string) error {
	raw, err := os.ReadFile(filepath.Join(bundle, "address"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the shim's socket: %w", err)
	}
	path, ok := strings.CutPrefix(string(raw), "unix://")
	if !ok || served(path) {
		return nil
	}
	return removeSocket(path)
}

// readPID returns the process id in a file, 0 where there is none.
func readPID(path string) uint32 {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 32)
	if err != nil {
		return 0
	}
	return uint32(pid)
}
