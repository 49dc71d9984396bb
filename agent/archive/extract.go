package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A dirTime is the time that a directory gets at the end.
type dirTime struct {
	name string
	meta Meta
}

// Extract extracts an archive into root, up to the end of what it is read from. What
// is there stays but what gives way to an entry. A symlink on the way is followed
// unless it leads out of root, whether it was there or came with the archive; that is
// an error, as is an entry's name that leads out. Errors have an errdefs class where
// it is known; what has been extracted then stays.
func Extract(root *os.Root, archive io.Reader) error {
	var dirs []dirTime
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Broken(err)
		}
		name := path.Clean(h.Name)
		if path.IsAbs(h.Name) || !filepath.IsLocal(name) || strings.ContainsRune(name, 0) {
			return Invalid("%q is not below the directory", h.Name)
		}
		// The directory itself is the container's, and no part of what it gets.
		if h.Typeflag == tar.TypeXGlobalHeader || name == "." {
			continue
		}
		in := &entering{root: root, name: name, base: path.Base(name), header: h}
		if err := in.enter(r); err != nil {
			return Failed("extract", name, err)
		}
		if in.made {
			dirs = append(dirs, dirTime{name: name, meta: in.meta})
		}
	}
	if _, err := io.Copy(io.Discard, archive); err != nil {
		return Broken(err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		d, err := root.OpenFile(dirs[i].name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // a later entry, or the container, has put something else there
		}
		err = dirs[i].meta.SetTime(int(d.Fd()))
		d.Close()
		if err != nil {
			return Failed("set time of", dirs[i].name, err)
		}
	}
	return nil
}

// An entering is one entry of an archive on its way in.
type entering struct {
	root   *os.Root
	name   string
	base   string
	dir    int // that base is in
	header *tar.Header
	meta   Meta
	made   bool // a directory, whose time is last
}

func (in *entering) enter(body io.Reader) error {
	var err error
	if in.meta, err = MetaOf(in.header); err != nil {
		return err
	}
	dir, err := openParent(in.root, in.name, true)
	if err != nil {
		return err
	}
	defer dir.Close()
	in.dir = int(dir.Fd())
	switch in.header.Typeflag {
	case tar.TypeReg:
		return in.file(body)
	case tar.TypeDir:
		return in.directory()
	case tar.TypeSymlink:
		return in.node(unix.S_IFLNK, func() error { return unix.Symlinkat(in.header.Linkname, in.dir, in.base) })
	case tar.TypeLink:
		return in.link()
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return in.device()
	}
	return Invalid("unknown type %q", in.header.Typeflag)
}

// openParent opens the directory that name is in. Missing ones are made, as root's,
// if make says so.
func openParent(root *os.Root, name string, make bool) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NONBLOCK
	above := path.Dir(name)
	dir, err := root.OpenFile(above, flags, 0)
	if make && errors.Is(err, os.ErrNotExist) {
		if err := root.MkdirAll(above, 0o755); err != nil {
			return nil, outside(err)
		}
		dir, err = root.OpenFile(above, flags, 0)
	}
	return dir, outside(err)
}

// outside gives the error for a path that leads out, which has no errno, its class.
func outside(err error) error {
	var errno unix.Errno
	if err == nil || errors.As(err, &errno) || errors.Is(err, os.ErrNotExist) {
		return err
	}
	return Invalid("a symlink leads out of the directory")
}

// file makes a regular file. The one that was there goes; only where it is the place
// of a mount it is written in place.
func (in *entering) file(body io.Reader) error {
	const flags = unix.O_WRONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK
	fd := -1
	err := in.replace(func() (err error) {
		fd, err = unix.Openat(in.dir, in.base, flags|unix.O_CREAT|unix.O_EXCL, 0o600)
		return err
	})
	if errors.Is(err, unix.EBUSY) {
		fd, err = unix.Openat(in.dir, in.base, flags|unix.O_TRUNC, 0)
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), in.base)
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("there is a mount that is not of a file: %w", errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	if _, err := io.Copy(f, body); err != nil {
		return Broken(err)
	}
	// By the descriptor: whatever the container has put at the name meanwhile, it
	// does not get the mode.
	if err := in.meta.Set(fd, xattrsOf(in.header)); err != nil {
		return err
	}
	return f.Close() // a file system of the host's may tell of a full disk only now
}

// directory makes a directory, or takes the one there is. That may be behind a
// symlink which leads to it and not out, which then stays what it is.
func (in *entering) directory() error {
	err := unix.Mkdirat(in.dir, in.base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(in.dir, in.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			info, err := in.root.Stat(in.name)
			if err == nil && !info.IsDir() {
				err = unix.EEXIST
			}
			return outside(err)
		}
		err = nil
	}
	if err != nil {
		return err
	}
	in.made = true
	return in.set(unix.S_IFDIR)
}

// link makes a hard link, to what is in the directory too. A symlink is linked to
// itself and not followed.
func (in *entering) link() error {
	to := path.Clean(in.header.Linkname)
	if path.IsAbs(in.header.Linkname) || !filepath.IsLocal(to) || to == "." {
		return Invalid("it is a link to %q, which is not below the directory", in.header.Linkname)
	}
	if to == in.name {
		return Invalid("it is a link to itself")
	}
	dir, err := openParent(in.root, to, false)
	if err != nil {
		return err
	}
	defer dir.Close()
	return in.replace(func() error {
		return unix.Linkat(int(dir.Fd()), path.Base(to), in.dir, in.base, 0)
	})
}

func (in *entering) device() error {
	const maxMajor, maxMinor = 1<<12 - 1, 1<<20 - 1
	h := in.header
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
	if h.Devmajor < 0 || h.Devmajor > maxMajor || h.Devminor < 0 || h.Devminor > maxMinor {
		return Invalid("device %d:%d", h.Devmajor, h.Devminor)
	}
	var dev uint64
	if h.Typeflag != tar.TypeFifo {
		dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	}
	return in.node(kind, func() error { return unix.Mknodat(in.dir, in.base, kind|0o600, int(dev)) })
}

// node makes something that is not a regular file.
func (in *entering) node(kind uint32, create func() error) error {
	if err := in.replace(create); err != nil {
		return err
	}
	return in.set(kind)
}

// set gives what was made, which is of that kind, all but its content.
func (in *entering) set(kind uint32) error {
	return At(in.dir, in.base, func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != kind {
			return fmt.Errorf("the container has put something else there: %w", errdefs.ErrAborted)
		}
		return in.meta.Set(fd, xattrsOf(in.header))
	})
}

// replace makes what create does, where nothing, or no directory, is.
func (in *entering) replace(create func() error) error {
	const attempts = 16 // of a container that puts something there over and again
	for attempt := 1; ; attempt++ {
		err := create()
		if !errors.Is(err, unix.EEXIST) || attempt == attempts {
			return err
		}
		if mount, err := isMount(in.dir, in.base); err != nil || mount {
			return errors.Join(err, unix.EBUSY)
		}
		switch err := unix.Unlinkat(in.dir, in.base, 0); {
		case errors.Is(err, unix.EISDIR):
			return fmt.Errorf("there is a directory: %w", errdefs.ErrAlreadyExists)
		case err != nil && !errors.Is(err, unix.ENOENT):
			return err
		}
	}
}

// isMount reports whether something is mounted on what base is in dir. Of mounts of
// another namespace than the agent's an unlink does not fail: it takes them away.
func isMount(dir int, base string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, base, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, err
}
