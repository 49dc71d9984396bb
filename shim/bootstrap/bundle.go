package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/husk-containers/husk/internal/child"
	"github.com/husk-containers/husk/shim/pod"
)

// The state directories of containerd's sandbox controllers by their names: that
// of 2.0 and later, and what all begin with.
const (
	shimController = "io.containerd.sandbox.controller.v1.shim"
	anyController  = "io.containerd.sandbox.controller.v1."
)

// readBundle finds out what the shim is started for, from the bundle that is the
// working directory. Start is called alike for a container and for a pod by the
// sandbox API. The bundle of the latter is in the sandbox controller's directory,
// STATE/CONTROLLER/NAMESPACE/ID, and holds a spec only where the client gave one,
// any one; that of a container always does.
func (r *request) readBundle() (pod.Place, error) {
	dir, err := os.Getwd()
	if err != nil {
		return pod.Place{}, fmt.Errorf("find the bundle: %w", err)
	}
	controller := filepath.Base(filepath.Dir(filepath.Dir(dir)))
	_, err = os.Stat(filepath.Join(dir, "config.json"))
	if strings.HasPrefix(controller, anyController) || errors.Is(err, fs.ErrNotExist) {
		r.hold = true
		if controller == shimController && r.dialect == plain {
			r.dialect = encoded
		}
		return pod.Place{Role: pod.Lone, Sandbox: r.id}, nil
	}
	return pod.ReadPlace(dir, r.id)
}

// pidFile names the bundle's daemon, while it has not ended in order: its pid and
// when it started, in clock ticks since the host's boot. The bundles of a pod's
// members have none.
const pidFile = "shim.pid"

// signIn writes the file of this process, in the working directory. It fails where
// containerd has removed the bundle meanwhile.
func signIn() error {
	began, err := child.StartTime(os.Getpid())
	if err == nil {
		err = os.WriteFile(pidFile, fmt.Appendf(nil, "%d %d\n", os.Getpid(), began), 0o644)
	}
	if err != nil {
		return fmt.Errorf("put the shim on record: %w", err)
	}
	return nil
}

// signOut removes the file of this process; that it is gone already is no error.
func signOut() error {
	if err := os.Remove(pidFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take the shim off record: %w", err)
	}
	return nil
}

// onRecord returns the bundle's daemon. It is fs.ErrNotExist where there is none.
func onRecord(bundle string) (pid int, began uint64, err error) {
	raw, err := os.ReadFile(filepath.Join(bundle, pidFile))
	if err == nil {
		_, err = fmt.Sscan(string(raw), &pid, &began)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("find the shim on record: %w", err)
	}
	return pid, began, nil
}

// hasDaemon tells whether the bundle has a daemon on record.
func hasDaemon(bundle string) bool {
	_, _, err := onRecord(bundle)
	return err == nil
}

// killShim kills the bundle's daemon where there is one that has not ended in
// order.
func killShim(bundle string) error {
	pid, began, err := onRecord(bundle)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = child.KillRecorded(pid, began)
	}
	if err != nil {
		return err
	}
	return os.Remove(filepath.Join(bundle, pidFile))
}
