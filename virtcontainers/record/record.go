// Package record is the clean-me record: what a sandbox holds on the host, for
// whoever has to take it back after a shim that died.
package record

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/husk-containers/husk/internal/child"
	processes "github.com/husk-containers/husk/internal/process"
	"github.com/husk-containers/husk/virtcontainers/cgroup"
	"github.com/husk-containers/husk/virtcontainers/storage"
)

// fileName is the record's name in the sandbox's bundle.
const fileName = "husk.json"

// A Record names what a sandbox holds on the host: it is written before the first
// resource is made and again before each process is relied on. What it does not
// name dies with the shim: mounts with its mount namespace, and a process that was
// spawned but not yet written down by its parent-death signal. Its methods are
// safe for concurrent use.
type Record struct {
	mu   sync.Mutex
	path string
	held held
}

// held is the file's content.
type held struct {
	Dir       string    `json:"dir"`
	Processes []process `json:"processes"`
	// Cgroups are directories of the host's hierarchies, to be removed.
	Cgroups []string `json:"cgroups,omitempty"`
	// Home are those that the shim is to go back to; none: it is where it was.
	Home []string `json:"home,omitempty"`
}

type process struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	// StartTime in clock ticks since the host's boot tells the process from a
	// later one of the same pid.
	StartTime uint64 `json:"start_time"`
}

// New returns the record, not written yet, of the sandbox of that bundle whose
// directory is dir.
func New(bundle, dir string) *Record {
	return &Record{path: filepath.Join(bundle, fileName), held: held{Dir: dir}}
}

// Open returns the record of the sandbox of that bundle whose directory is dir: the one
// that was begun there before there was a sandbox, or a new one.
func Open(bundle, dir string) (*Record, error) {
	r := New(bundle, dir)
	if err := r.read(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the clean-up record: %w", err)
	}
	r.held.Dir = dir
	return r, nil
}

func (r *Record) read() error {
	raw, err := os.ReadFile(r.path)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, &r.held)
}

// Enter puts on record, before the shim enters a cgroup, where it is to go back to.
func (r *Record) Enter(home []string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held.Home = home
	if err := r.write(); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	return nil
}

// MakeCgroup makes the cgroup that a spec's linux.cgroupsPath names, and returns where
// this process is as yet. Both are put on record first.
func (r *Record) MakeCgroup(cgroupsPath string) (group *cgroup.Cgroup, home []string, err error) {
	path, err := cgroup.Parse(cgroupsPath)
	if err != nil {
		return nil, nil, fmt.Errorf("linux.cgroupsPath: %w", err)
	}
	here, err := cgroup.Of(os.Getpid())
	if err != nil {
		return nil, nil, err
	}
	home = here.Dirs()
	if err := r.Enter(home); err != nil {
		return nil, nil, err
	}
	group, err = cgroup.New(path, r.AddCgroup)
	return group, home, err
}

// Entered returns where the shim is to go back to, nil where it has entered no cgroup,
// and the directories of cgroups that are to be removed.
func (r *Record) Entered() (home, created []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held.Home, slices.Clone(r.held.Cgroups)
}

// Add puts a process on record. One that has ended already is not held: who runs
// it learns of that.
func (r *Record) Add(name string, pid int) error {
	start, err := child.StartTime(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record process %s: %w", name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held.Processes = append(r.held.Processes, process{name, pid, start})
	if err := r.write(); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	return nil
}

// PIDs are the processes on record and those that they have started: virtiofsd works in
// a child of its own. Where /proc cannot be read they are those on record.
func (r *Record) PIDs() []int {
	r.mu.Lock()
	var pids []int
	for _, p := range r.held.Processes {
		pids = append(pids, p.PID)
	}
	r.mu.Unlock()
	all, err := processes.Table("/proc").All()
	if err != nil {
		return pids // whoever wants to do something with them cannot either
	}
	return processes.WithChildren(all, pids)
}

// AddCgroup puts the directories of a cgroup on record, before they are made.
func (r *Record) AddCgroup(dirs []string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held.Cgroups = append(r.held.Cgroups, dirs...)
	if err := r.write(); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	return nil
}

// Drop takes a process that has ended, and directories of cgroups that are removed,
// off the record: a sandbox may see many come and go.
func (r *Record) Drop(pid int, cgroup []string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held.Processes = slices.DeleteFunc(r.held.Processes, func(p process) bool { return p.PID == pid })
	r.held.Cgroups = slices.DeleteFunc(r.held.Cgroups, func(dir string) bool { return slices.Contains(cgroup, dir) })
	if err := r.write(); err != nil {
		return fmt.Errorf("write the clean-up record: %w", err)
	}
	return nil
}

// write replaces the file whole; the lock keeps the order of its versions.
func (r *Record) write() error {
	raw, err := json.Marshal(r.held)
	if err != nil {
		return err
	}
	tmp := r.path + ".tmp"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.path)
}

// Leave moves the record from the bundle, which is about to be deleted, to the
// sandbox's own directory: that of a shim which dies after its bundle is told of
// there.
func (r *Record) Leave() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	bundle := r.path
	r.path = filepath.Join(r.held.Dir, fileName)
	if err := r.write(); err != nil {
		return fmt.Errorf("move the clean-up record: %w", err)
	}
	if err := os.Remove(bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move the clean-up record: %w", err)
	}
	return nil
}

// Remove removes the record, once nothing is held any more.
func (r *Record) Remove() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Cleanup takes back, in a fresh process, everything that the sandbox of the
// bundle still holds. A bundle without a record holds nothing. It goes on past
// errors and joins them, and is idempotent. ctx bounds the wait for killed processes to
// leave their cgroups.
func Cleanup(ctx context.Context, bundle string) error {
	r := New(bundle, "")
	err := r.read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the clean-up record: %w", err)
	}
	var errs []error
	for _, p := range r.held.Processes {
		// The shim comes first: it may not start what is being taken back.
		if p.PID == os.Getpid() {
			continue
		}
		if err := child.KillRecorded(p.PID, p.StartTime); err != nil {
			errs = append(errs, fmt.Errorf("kill %s: %w", p.Name, err))
		}
	}
	if r.held.Dir != "" {
		errs = append(errs, storage.RemoveTree(r.held.Dir))
	}
	// Last, as what is young and not on record may yet be ending.
	errs = append(errs, cgroup.Remove(ctx, r.held.Cgroups))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up after the sandbox: %w", err) // the record stays for another try
	}
	return r.Remove()
}
