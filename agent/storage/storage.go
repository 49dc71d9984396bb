// Package storage mounts what the containers of a sandbox share: directories of the
// host, and the guest's own memory and huge pages.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Set is the storages that are mounted. Its methods are safe for concurrent use:
// calls are served in turn.
type Set struct {
	volumes string // directory of the volumes of memory
	pools   pools

	turn    chan struct{} // holds one token while nobody changes anything
	mounted map[string]*mount
	demands map[uint64]*demand // by the size of a page
}

// A mount is a storage, and what has been done for it.
type mount struct {
	storage *agentv1.Storage
	there   bool   // it is mounted
	pages   uint64 // that the pool was enlarged by
	demands bool   // it is one of the volumes of a demand
}

// New returns an empty Set, whose storages of memory are below volumes. That is
// made a shared mount: who has taken it over with the propagation rslave sees what
// is mounted there later.
func New(volumes string) (*Set, error) {
	err := os.MkdirAll(volumes, 0o711)
	if err == nil {
		err = unix.Mount(volumes, volumes, "", unix.MS_BIND, "")
	}
	if err == nil {
		err = unix.Mount("", volumes, "", unix.MS_SHARED, "")
	}
	if err != nil {
		return nil, fmt.Errorf("set up the directory of volumes %s: %w", volumes, err)
	}
	s := &Set{
		volumes: volumes, pools: sysfs("/sys/kernel/mm/hugepages"),
		turn: make(chan struct{}, 1), mounted: make(map[string]*mount), demands: make(map[uint64]*demand),
	}
	s.turn <- struct{}{}
	return s, nil
}

// take waits for the caller's turn, which give ends.
func (s *Set) take(ctx context.Context) error {
	select {
	case <-s.turn:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Set) give() { s.turn <- struct{}{} }

// MountStorage mounts st, which is valid, and makes the directories below it that
// are not there. Where it is mounted already it only does the latter. On error
// nothing is mounted that was not before.
func (s *Set) MountStorage(ctx context.Context, st *agentv1.Storage, directories []*agentv1.Directory) error {
	if err := s.take(ctx); err != nil {
		return fmt.Errorf("mount %s: %w", describe(st), err)
	}
	defer s.give()
	if err := s.mount(st, directories); err != nil {
		return fmt.Errorf("mount %s: %w", describe(st), err)
	}
	return nil
}

func (s *Set) mount(st *agentv1.Storage, directories []*agentv1.Directory) (err error) {
	share := st.GetKind() == agentv1.Storage_KIND_VIRTIOFS
	switch {
	case share && len(directories) > 0:
		return fmt.Errorf("the directories below it are the host's to make: %w", errdefs.ErrInvalidArgument)
	case !share && !agentv1.Below(st.GetTarget(), s.volumes):
		return fmt.Errorf("the target is not below %s: %w", s.volumes, errdefs.ErrInvalidArgument)
	}
	if have := s.mounted[st.GetTarget()]; have != nil {
		if !proto.Equal(have.storage, st) {
			return fmt.Errorf("%s is there: %w", describe(have.storage), errdefs.ErrAlreadyExists)
		}
		return makeDirectories(st.GetTarget(), directories)
	}
	m := &mount{storage: st}
	if err := os.MkdirAll(st.GetTarget(), 0o755); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmount(m))
		}
	}()
	switch st.GetKind() {
	case agentv1.Storage_KIND_VIRTIOFS:
		err = m.share()
	case agentv1.Storage_KIND_TMPFS:
		err = m.memory("tmpfs", sizeOption(st))
	case agentv1.Storage_KIND_HUGETLBFS:
		if err = s.provide(m); err == nil {
			err = m.memory("hugetlbfs", fmt.Sprintf("pagesize=%d%s", st.GetPageBytes(), sizeOption(st)))
		}
	default:
		err = fmt.Errorf("kind %s: %w", st.GetKind(), errdefs.ErrNotImplemented)
	}
	if err == nil {
		err = makeDirectories(st.GetTarget(), directories)
	}
	if err == nil && !share && st.GetReadOnly() {
		err = unix.Mount("", st.GetTarget(), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	if err != nil {
		return err
	}
	s.mounted[st.GetTarget()] = m
	return nil
}

// provide sees to huge pages for a volume: all of its size, or of none those that are
// asked for.
func (s *Set) provide(m *mount) (err error) {
	if m.storage.GetSizeBytes() > 0 {
		m.pages, err = addPages(s.pools, m.storage.GetPageBytes(), m.storage.GetSizeBytes())
		return err
	}
	err = s.addDemand(m.storage.GetPageBytes())
	m.demands = err == nil
	return err
}

// share mounts a directory of the host. The mount is shared, for what the agent
// mounts below it later is for containers too.
func (m *mount) share() error {
	var flags uintptr
	if m.storage.GetReadOnly() {
		flags |= unix.MS_RDONLY
	}
	if err := m.at(m.storage.GetSource(), "virtiofs", flags, ""); err != nil {
		return err
	}
	return unix.Mount("", m.storage.GetTarget(), "", unix.MS_SHARED, "")
}

// memory mounts a file system of the guest's memory, without any flags, as the
// kubelet does. What is stored there is charged to the cgroup that stores it.
func (m *mount) memory(fstype, options string) error {
	if err := m.at(fstype, fstype, 0, options); err != nil {
		return err
	}
	target := m.storage.GetTarget()
	if err := os.Chown(target, int(m.storage.GetUid()), int(m.storage.GetGid())); err != nil {
		return err
	}
	return unix.Chmod(target, m.storage.GetMode()) // as an option hugetlbfs would drop some bits
}

func (m *mount) at(source, fstype string, flags uintptr, options string) error {
	err := unix.Mount(source, m.storage.GetTarget(), fstype, flags, options)
	m.there = err == nil
	return err
}

func sizeOption(st *agentv1.Storage) string {
	if st.GetSizeBytes() == 0 {
		return ""
	}
	return fmt.Sprintf(",size=%d", st.GetSizeBytes())
}

// makeDirectories makes directories below target, but for those that are there.
// Containers write below target too: no symbolic link of theirs leads out of it.
func makeDirectories(target string, directories []*agentv1.Directory) error {
	if len(directories) == 0 {
		return nil
	}
	root, err := os.OpenRoot(target)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, d := range directories {
		if err := makeDirectory(root, d); err != nil {
			return fmt.Errorf("make directory %q: %w", d.GetPath(), err)
		}
	}
	return nil
}

func makeDirectory(root *os.Root, d *agentv1.Directory) error {
	parent, name := filepath.Split(d.GetPath())
	if parent != "" {
		above, err := root.OpenRoot(parent)
		if err != nil {
			return err
		}
		defer above.Close()
		root = above
	}
	err := root.Mkdir(name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		info, err := root.Lstat(name)
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("it is there, and a %s: %w", info.Mode().Type(), errdefs.ErrFailedPrecondition)
		}
		return err
	}
	if err != nil {
		return err
	}
	// What a container may put in its place meanwhile is in the volume as well.
	if err := root.Lchown(name, int(d.GetUid()), int(d.GetGid())); err != nil {
		return err
	}
	return root.Chmod(name, fileMode(d.GetMode()))
}

// fileMode is the mode of a directory with the bits of stat(2) in mode.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode).Perm()
	for bit, flag := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

// UnmountStorage unmounts what is at target and gives back its huge pages. What
// still uses it keeps it until it ends. Where nothing is mounted it does nothing.
func (s *Set) UnmountStorage(ctx context.Context, target string) error {
	if err := s.take(ctx); err != nil {
		return fmt.Errorf("unmount storage at %s: %w", target, err)
	}
	defer s.give()
	m := s.mounted[target]
	if m == nil {
		return nil
	}
	if err := s.unmount(m); err != nil {
		return fmt.Errorf("unmount %s: %w", describe(m.storage), err)
	}
	delete(s.mounted, target)
	return nil
}

// unmount undoes as much of mount as has been done.
func (s *Set) unmount(m *mount) error {
	target := m.storage.GetTarget()
	if m.there {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT { // somebody else has done it
			return err
		}
		m.there = false
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if m.pages > 0 {
		if err := removePages(s.pools, m.storage.GetPageBytes(), m.pages); err != nil {
			return err
		}
		m.pages = 0
	}
	if m.demands {
		if err := s.removeDemand(m.storage.GetPageBytes()); err != nil {
			return err
		}
		m.demands = false
	}
	return nil
}

// describe names a storage in errors.
func describe(st *agentv1.Storage) string {
	switch st.GetKind() {
	case agentv1.Storage_KIND_VIRTIOFS:
		return fmt.Sprintf("share %q on %s", st.GetSource(), st.GetTarget())
	case agentv1.Storage_KIND_TMPFS:
		return "memory on " + st.GetTarget()
	case agentv1.Storage_KIND_HUGETLBFS:
		return "huge pages on " + st.GetTarget()
	}
	return "storage on " + st.GetTarget()
}
