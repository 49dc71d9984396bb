package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A Mirror shows the guest a tree of mounts as the host has it at any time, and keeps
// no mount of the host busy. There are two copies. What the host mounts and unmounts
// reaches the first by the kernel's propagation; nobody opens anything in it, for
// umount(2) fails on the host where a mount that it would take along is in use. The
// second is private and the one that is shown: Sync makes it like the first.
//
// Of several mounts at one place it shows the one on top, and nothing of what is
// mounted over the root itself. Its methods are safe for concurrent use.
type Mirror struct {
	dir, target string
	readOnly    bool     // all but the root
	first       *os.File // roots of the copies
	second      *os.File

	turn   chan struct{} // who has put something in may use what is below
	seen   map[string]mounted
	closed bool
}

// NewMirror attaches the copy that is shown at target, and keeps the other one below
// stage, a directory that the guest does not see. It takes over tree, a clone.
func NewMirror(tree *os.File, stage, target string, a Attributes) (_ *Mirror, err error) {
	m := &Mirror{target: target, readOnly: a.AllReadOnly, first: tree, turn: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if m.dir, err = os.MkdirTemp(stage, "follows-"); err != nil {
		return nil, err
	}
	for _, dir := range []string{m.origin(), m.snapshot()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := attach(tree, m.origin(), unix.MS_SLAVE, Attributes{Recursive: a.Recursive}); err != nil {
		return nil, err
	}
	if m.second, err = cloneOf(tree, false); err != nil {
		return nil, err
	}
	if err := Attach(m.second, target, Attributes{ReadOnly: a.ReadOnly || a.AllReadOnly}); err != nil {
		return nil, err
	}
	if err := m.Sync(); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *Mirror) origin() string   { return filepath.Join(m.dir, "origin") }
func (m *Mirror) snapshot() string { return filepath.Join(m.dir, "now") }

// Root returns an O_PATH file of the root of what is shown, until Close.
func (m *Mirror) Root() *os.File { return m.second }

// Sync shows what the host has now, and should be called whenever this process's
// mounts have changed; see proc(5) on mountinfo. What cannot be shown stays away until
// the host's mounts there change again.
func (m *Mirror) Sync() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if m.closed {
		return nil
	}
	now, err := visible(m.origin())
	if err != nil || maps.Equal(now, m.seen) {
		return err
	}
	// Before the rest, which changes the mounts, too, and so has Sync called again.
	m.seen = now
	if err := m.sync(); err != nil {
		return fmt.Errorf("show the host's mounts at %s: %w", m.target, err)
	}
	return nil
}

// sync takes each mount out of a copy of the first tree, which is made in one step
// from its root: even a walk to a mount would make it busy.
func (m *Mirror) sync() (err error) {
	tree, err := cloneOf(m.first, true)
	if err != nil {
		return err
	}
	defer tree.Close() //nolint:errcheck // a path only
	if err := Attach(tree, m.snapshot(), Attributes{Recursive: true}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Detach(m.snapshot())) }()
	want, err := visible(m.snapshot())
	if err != nil {
		return err
	}
	have, err := visible(m.target)
	if err != nil {
		return err
	}
	var errs []error
	paths := slices.Sorted(maps.Keys(have))
	for _, path := range slices.Backward(paths) { // the deepest first
		if w, ok := want[path]; !ok || have[path].what != m.shown(w.what) {
			errs = append(errs, detachBelow(m.second, path))
		}
	}
	if have, err = visible(m.target); err != nil { // without what has gone along
		return errors.Join(append(errs, err)...)
	}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if _, ok := have[path]; !ok {
			if err := m.show(tree, path); !errors.Is(err, fs.ErrNotExist) { // it has gone meanwhile
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// shown is what something of the host's is where it is shown.
func (m *Mirror) shown(w what) what {
	if m.readOnly {
		w.options = "ro" + strings.TrimPrefix(w.options, "rw")
	}
	return w
}

// show attaches what tree has at a path.
func (m *Mirror) show(tree *os.File, path string) error {
	from, err := within(tree, path)
	if err != nil {
		return err
	}
	defer from.Close() //nolint:errcheck // a path only
	to, err := within(m.second, path)
	if err != nil {
		return err
	}
	defer to.Close() //nolint:errcheck // a path only
	one, err := cloneOf(from, false)
	if err != nil {
		return err
	}
	defer one.Close() //nolint:errcheck // attached, or not wanted
	if err := set(one, unix.MS_PRIVATE, Attributes{ReadOnly: m.readOnly}); err != nil {
		return err
	}
	err = unix.MoveMount(int(one.Fd()), "", int(to.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return &fs.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

// Close undoes what NewMirror has done, whatever is in use of what was shown.
func (m *Mirror) Close() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()
	if m.closed {
		return nil
	}
	m.closed = true
	errs := []error{Detach(m.target), m.first.Close()}
	if m.second != nil {
		errs = append(errs, m.second.Close())
	}
	if m.dir == "" {
		return errors.Join(errs...)
	}
	errs = append(errs, Detach(m.origin()))
	for _, dir := range []string{m.origin(), m.snapshot(), m.dir} {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// A mounted is a mount that a path leads to.
type mounted struct {
	id int // the kernel's, which it uses again
	what
}

// A what tells mounts apart as those see them who use them. While one is mounted, no
// other file system has its device number.
type what struct {
	below        string // path of the mount that it is on
	major, minor int
	root         string // directory of the file system
	options      string
}

// visible returns what is mounted below dir, by path relative to it, as a walk from
// what is lowest there finds it.
func visible(dir string) (map[string]mounted, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("list what is mounted: %w", err)
	}
	type place struct {
		parent int
		path   string
	}
	on, ids := map[place]*mountinfo.Info{}, map[int]bool{}
	for _, m := range mounts {
		on[place{m.Parent, m.Mountpoint}], ids[m.ID] = m, true
	}
	lowest := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return m.Mountpoint == dir && !ids[m.Parent] })
	if lowest < 0 {
		return nil, fmt.Errorf("nothing is mounted at %s", dir)
	}
	relative := func(m *mountinfo.Info) string { return strings.TrimPrefix(m.Mountpoint[len(dir):], "/") }
	all := map[string]mounted{}
	for _, m := range mounts {
		path := relative(m)
		if path == "" {
			continue
		}
		var below *mountinfo.Info
		at := mounts[lowest]
		for i := range len(path) + 1 {
			if i < len(path) && path[i] != '/' {
				continue
			}
			below = at
			for next := at; next != nil; next = on[place{at.ID, filepath.Join(dir, path[:i])}] {
				at = next
			}
		}
		if at.Mountpoint == m.Mountpoint { // otherwise it is hidden
			all[path] = mounted{id: at.ID, what: what{
				below: relative(below), major: at.Major, minor: at.Minor, root: at.Root, options: at.Options,
			}}
		}
	}
	return all, nil
}

// cloneOf clones what an O_PATH file is of.
func cloneOf(file *os.File, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(int(file.Fd()), "", flags)
	if err != nil {
		return nil, &fs.PathError{Op: "open_tree", Path: file.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// within opens a path below dir. No symbolic link is followed: a container may have
// made one since the path was read.
func within(dir *os.File, path string) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// detachBelow unmounts what is mounted at a path below dir, if something is.
func detachBelow(dir *os.File, path string) error {
	file, err := within(dir, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // a path only
	err = unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return &fs.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}
