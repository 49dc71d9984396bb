package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/copies"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
)

// maxBare is how many directories a tmpfs may have to be taken for one that nobody
// has filled yet.
const maxBare = 1024

// A source is a host path that a container mounts: a detached clone of its mount, as
// an O_PATH file, and what it is.
type source struct {
	*os.File
	facts
	name     string // on the host, absolute
	dev, ino uint64
	uid, gid uint32
	// root is which directory of its file system it is, of a tmpfs.
	root string
	// size of the file system, and of its blocks, in bytes.
	size, block uint64
	// directories below it, where it is fresh.
	directories []*agentv1.Directory
}

// open takes what a bind is of, and looks at it.
func open(b *spec.Bind, bundle string, clone storage.Clone) (*source, error) {
	name := b.Source
	if !filepath.IsAbs(name) {
		name = filepath.Join(bundle, name)
	}
	tree, err := clone(name, b.Recursive)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("source %s does not exist on the host: %w", name, errdefs.ErrNotFound)
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("source %s is a loop of symbolic links: %w", name, errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("source %s: a part of the path is not a directory: %w", name, errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, fmt.Errorf("source: %w", err)
	}
	s := &source{File: tree, name: name}
	if err := s.look(); err != nil {
		return nil, errors.Join(fmt.Errorf("source %s: %w", name, err), s.Close())
	}
	return s, nil
}

// look takes what the file itself tells.
func (s *source) look() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	info, err := s.Stat()
	if err != nil {
		return err
	}
	var sf unix.Statfs_t
	if err := unix.Fstatfs(int(s.Fd()), &sf); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	s.dev, s.ino, s.uid, s.gid = st.Dev, st.Ino, st.Uid, st.Gid
	s.size, s.block = sf.Blocks*uint64(sf.Bsize), uint64(sf.Bsize)
	s.facts = facts{mode: info.Mode(), major: unix.Major(st.Rdev), minor: unix.Minor(st.Rdev), fstype: sf.Type}
	return nil
}

// lookBelow takes what a directory's content tells, and its place in its file system.
// stage is a directory of the host's that no guest sees.
func (s *source) lookBelow(b *spec.Bind, stage string, clone storage.Clone) error {
	if !s.mode.IsDir() {
		return nil
	}
	if s.fstype == unix.TMPFS_MAGIC {
		if err := s.locate(stage, clone); err != nil {
			return err
		}
	}
	if s.fstype == unix.TMPFS_MAGIC && !s.devtmpfs && s.mode.Perm() == anyones {
		bare, err := s.list(".")
		if err != nil {
			return err
		}
		s.fresh = bare && !s.ofHost(clone)
	}
	if !b.ReadOnly || s.fresh {
		return nil
	}
	var err error
	s.atomic, err = copies.AtomicWriter(s.File)
	return err
}

// ofHost tells whether the source is on one of the host's own file systems.
func (s *source) ofHost(clone storage.Clone) bool {
	return slices.ContainsFunc(hostsOwn, func(dir string) bool {
		tree, err := clone(dir, false)
		if err != nil {
			return false // the host has none such
		}
		defer tree.Close() //nolint:errcheck // a path only
		var st unix.Stat_t
		return unix.Fstat(int(tree.Fd()), &st) == nil && st.Dev == s.dev
	})
}

// path leads to the source through this process's table of files: its clone is not
// mounted anywhere.
func (s *source) path() string { return fmt.Sprintf("/proc/self/fd/%d", s.Fd()) }

// locate finds of which file system the source is which directory. Only a mount in
// this process's own namespace tells, so it makes one, of another clone, for the
// moment.
func (s *source) locate(stage string, clone storage.Clone) (err error) {
	dir, err := os.MkdirTemp(stage, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	tree, err := clone(s.name, false)
	if err != nil {
		return err
	}
	defer tree.Close() //nolint:errcheck // a path only
	if err := storage.Attach(tree, dir, storage.Attributes{ReadOnly: true}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, storage.Detach(dir)) }()
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil {
		return err
	}
	if len(mounts) != 1 {
		return fmt.Errorf("find what is mounted at %s: %d mounts", dir, len(mounts))
	}
	s.root, s.devtmpfs = mounts[0].Root, mounts[0].FSType == "devtmpfs"
	return nil
}

// list lists the directories below one of the source's, and tells whether there is
// nothing else. It stays within the file system.
func (s *source) list(dir string) (bare bool, err error) {
	entries, err := os.ReadDir(filepath.Join(s.path(), dir))
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if !e.IsDir() || len(s.directories) == maxBare {
			return false, nil
		}
		name := path.Join(dir, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(s.path(), name), &st); err != nil {
			return false, &fs.PathError{Op: "stat", Path: name, Err: err}
		}
		if st.Dev != s.dev { // something else is mounted there
			return false, nil
		}
		s.directories = append(s.directories, &agentv1.Directory{Path: name, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid})
		if bare, err := s.list(name); !bare || err != nil {
			return false, err
		}
	}
	return true, nil
}

// tree lists the source as a directory of its file system, and those below it, each
// after the one that it is in.
func (s *source) tree() []*agentv1.Directory {
	root := path.Clean("/" + s.root)[1:]
	if root == "" {
		return s.directories
	}
	var all []*agentv1.Directory
	for i, c := range root + "/" {
		if c == '/' {
			all = append(all, &agentv1.Directory{Path: root[:i], Mode: s.permissions(), Uid: s.uid, Gid: s.gid})
		}
	}
	for _, d := range s.directories {
		all = append(all, &agentv1.Directory{Path: path.Join(root, d.Path), Mode: d.Mode, Uid: d.Uid, Gid: d.Gid})
	}
	return all
}

// permissions are the source's mode as chmod takes it.
func (s *source) permissions() uint32 {
	mode := uint32(s.mode.Perm())
	for bit, n := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if s.mode&bit != 0 {
			mode |= n
		}
	}
	return mode
}

// Tmpfs tells whether what a bind is of lies on a tmpfs, and how many bytes that may
// hold.
func Tmpfs(b *spec.Bind, bundle string, clone storage.Clone) (size uint64, yes bool, err error) {
	src, err := open(b, bundle, clone)
	if err != nil {
		return 0, false, fmt.Errorf("%s: %w", b.Field, err)
	}
	return src.size, src.fstype == unix.TMPFS_MAGIC, src.Close()
}
