package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/child"
)

// recordName is the clean-me record's file in the sandbox's bundle.
const recordName = "husk.json"

// A record names what a sandbox holds on the host, for a process that knows
// nothing else: it is written before the first resource is made and again before
// each process is relied on. What it does not name dies with the shim: mounts
// with its mount namespace, and a process that was spawned but not yet written
// down by its parent-death signal.
type record struct {
	mu   sync.Mutex
	path string

	Dir       string            `json:"dir"`
	Processes []recordedProcess `json:"processes"`
}

type recordedProcess struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	// StartTime in clock ticks since the host's boot tells the process from a
	// later one of the same pid.
	StartTime uint64 `json:"start_time"`
}

func newRecord(bundle, dir string) *record {
	return &record{path: filepath.Join(bundle, recordName), Dir: dir}
}

// add puts a running process on record.
func (r *record) add(name string, pid int) error {
	start, err := child.StartTime(pid)
	if err != nil {
		return fmt.Errorf("record process %s: %w", name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Processes = append(r.Processes, recordedProcess{name, pid, start})
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	tmp := r.path + ".tmp"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	if err := os.Rename(tmp, r.path); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	return nil
}

func (r *record) remove() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Cleanup takes back, in a fresh process, everything that the sandbox of the
// bundle still holds. A bundle without a record holds nothing. It goes on past
// errors and joins them, and is idempotent.
func Cleanup(_ context.Context, bundle string) error {
	r := newRecord(bundle, "")
	raw, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(raw, r)
	}
	if err != nil {
		return fmt.Errorf("read the clean-up record: %w", err)
	}
	var errs []error
	for _, p := range r.Processes {
		// The shim comes first: it may not start what is being taken back.
		if p.PID == os.Getpid() {
			continue
		}
		if err := child.KillRecorded(p.PID, p.StartTime); err != nil {
			errs = append(errs, fmt.Errorf("kill %s: %w", p.Name, err))
		}
	}
	if r.Dir != "" {
		errs = append(errs, removeTree(r.Dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up after the sandbox: %w", err) // the record stays for another try
	}
	return r.remove()
}

// removeTree removes dir, unmounting first what is mounted below it, and never
// crosses into a mount: it fails rather than delete what a bind mount shows.
func removeTree(dir string) error {
	if err := mount.UnmountRecursive(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}
