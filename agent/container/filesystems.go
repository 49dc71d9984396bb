package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// fileSystems are the host's file systems that containers use, as submounts of the
// virtio-fs share, held in the agent's own mount namespace for as long as a
// container is there that names them: several may name the same one.
//
// The kernel mounts a submount where it is first walked into. That must not be the
// container's mount namespace alone: its last process would unmount it as it ends,
// and when a read-ahead of that process's own program is still under way then, the
// kernel (6.1, fs/fuse: the last reference to the file, and so to its inode, goes
// with the answer) finds "Busy inodes after unmount", stops the process for good
// inside its exit, and nobody ever learns of that.
type fileSystems struct {
	mu  sync.Mutex
	all map[string]*fileSystem // by directory
}

// A fileSystem is held, or about to be, or about to be let go of. Its fields are
// under fileSystems.mu.
type fileSystem struct {
	users int
	dir   *os.File
	// changing is closed at the end of what happens to it; nil: nothing does. Who
	// comes meanwhile waits, and so never takes what is being unmounted for held.
	changing chan struct{}
}

func newFileSystems() *fileSystems { return &fileSystems{all: make(map[string]*fileSystem)} }

// hold walks into each directory that nobody holds, and returns those that it
// holds now: one that is no directory, or none any more, is no submount. On error
// it holds none.
func (f *fileSystems) hold(ctx context.Context, directories []string) (held []string, err error) {
	for _, dir := range directories {
		ok, err := f.holdOne(ctx, dir)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold file system: %w", err), f.release(held))
		}
		if ok {
			held = append(held, dir)
		}
	}
	return held, nil
}

func (f *fileSystems) holdOne(ctx context.Context, dir string) (held bool, err error) {
	for {
		f.mu.Lock()
		s := f.all[dir]
		if s == nil {
			s = &fileSystem{users: 1, changing: make(chan struct{})}
			f.all[dir] = s
			f.mu.Unlock()
			return f.open(s, dir)
		}
		changing := s.changing
		if changing == nil {
			s.users++
		}
		f.mu.Unlock()
		if changing == nil {
			return true, nil
		}
		select {
		case <-changing:
		case <-ctx.Done():
			return false, fmt.Errorf("wait for %s: %w", dir, context.Cause(ctx))
		}
	}
}

// open walks into the directory of s, which is the caller's to change.
func (f *fileSystems) open(s *fileSystem, dir string) (held bool, err error) {
	file, err := walkInto(dir)
	f.mu.Lock()
	defer f.mu.Unlock()
	close(s.changing)
	s.changing = nil
	if err != nil {
		delete(f.all, dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			err = nil
		}
		return false, err
	}
	s.dir = file
	return true, nil
}

// walkInto opens a directory, and so has the kernel mount what appears there. The
// kernel may take it for the directory that it was up to a second ago, before the
// host mounted something there: then it is made to ask.
//
// link(2) to a name looks that name up with the demand that it be not there, for which
// nothing cached is good enough, and then finds that it is, or that the file is of
// another file system: so it changes nothing.
func walkInto(dir string) (*os.File, error) {
	file, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Statx_t
	err = unix.Statx(int(file.Fd()), "", unix.AT_EMPTY_PATH, 0, &st)
	if err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return file, nil
	}
	file.Close()                      //nolint:errcheck // a path only
	unix.Link("/proc/self/comm", dir) //nolint:errcheck // it fails
	return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// release lets go of what hold has returned, the last first, and unmounts what
// nobody else holds.
func (f *fileSystems) release(held []string) error {
	var errs []error
	for i := len(held) - 1; i >= 0; i-- {
		f.mu.Lock()
		s := f.all[held[i]]
		s.users--
		last := s.users == 0
		if last {
			s.changing = make(chan struct{})
		}
		f.mu.Unlock()
		if !last {
			continue
		}
		errs = append(errs, s.unmount())
		f.mu.Lock()
		delete(f.all, held[i])
		close(s.changing)
		f.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (s *fileSystem) unmount() error {
	// The host answers in order: after the first answer no read is under way,
	// and after the second the closes have been answered that came of the reads.
	var st unix.Statfs_t
	for range 2 {
		unix.Fstatfs(int(s.dir.Fd()), &st) //nolint:errcheck // the answer counts, not what it is
	}
	err := unix.Unmount(s.dir.Name(), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	s.dir.Close()                                               //nolint:errcheck // a path only
	if err != nil && err != unix.EINVAL && err != unix.ENOENT { // not, or no longer, a mount
		return fmt.Errorf("let go of file system %s: %w", s.dir.Name(), err)
	}
	return nil
}
