package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/beneath"
	"github.com/husk-containers/husk/protocols/files"
)

// An inode is what hard links share.
type inode struct{ dev, ino uint64 }

// An archiver writes an archive of what base is in the directory top. It keeps no
// directory open but the one that it is at, however deep they nest.
type archiver struct {
	tar   *tar.Writer
	top   int
	base  string
	name  string // of base in the archive
	links map[inode]string
	todo  []string // directories whose entries are still to come, below base
	buf   []byte
}

// Write writes to w an archive of what base, a single element or ".", is in the
// directory top: name and, after slashes, what is below it. Symlinks are not followed
// and sockets left out, and so is what is in file systems that are the kernel's own.
// What vanishes meanwhile is no error, but for base.
func Write(w io.Writer, top int, base, name string) error {
	a := &archiver{tar: tar.NewWriter(w), top: top, base: base, name: name, links: make(map[inode]string), buf: make([]byte, 64<<10)}
	if err := a.entry(a.top, a.base, ""); err != nil {
		return Failed("archive", a.name, err)
	}
	for len(a.todo) > 0 {
		dir := a.todo[len(a.todo)-1]
		a.todo = a.todo[:len(a.todo)-1]
		if err := a.list(dir); err != nil {
			return Failed("archive", path.Join(a.name, dir), err)
		}
	}
	return a.tar.Close()
}

// list writes what is in a directory. One that has vanished had been there.
func (a *archiver) list(dir string) error {
	fd, err := beneath.Open(a.top, path.Join(a.base, dir), unix.O_RDONLY|unix.O_DIRECTORY)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	for {
		names, err := d.Readdirnames(1024)
		for _, name := range names {
			err := a.entry(fd, name, path.Join(dir, name))
			if err != nil && !gone(err) {
				return fmt.Errorf("%q: %w", name, err)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// gone reports an error of what was there, and no longer is.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// entry writes what base is in dir; below is what that is below a.base.
func (a *archiver) entry(dir int, base, below string) error {
	fd, err := beneath.Open(dir, base, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	name := path.Join(a.name, below)
	h, err := files.Header(name, &st)
	if err != nil {
		slog.Debug("not in the archive", "err", err)
		return nil
	}
	if h.Typeflag == tar.TypeSymlink {
		if h.Linkname, err = Readlink(fd, ""); err != nil {
			return err
		}
	}
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
		if own, err := kernelsOwn(fd); err != nil {
			return err
		} else if !own {
			a.todo = append(a.todo, below)
		}
	} else if st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if first := a.links[id]; first != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return a.tar.WriteHeader(h)
		}
		a.links[id] = name
	}
	if err := addXattrs(h, fd); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return a.tar.WriteHeader(h)
	}
	f, err := openFile(fd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := a.tar.WriteHeader(h); err != nil {
		return err
	}
	// What a writer adds meanwhile is left out; the size has been told.
	n, err := io.CopyBuffer(a.tar, struct{ io.Reader }{io.LimitReader(f, h.Size)}, a.buf)
	if err == nil && n < h.Size {
		err = fmt.Errorf("the file became shorter while it was read: %w", errdefs.ErrAborted)
	}
	return err
}

// kernelsOwn reports whether a directory is of a file system in which files stand
// for what the kernel does: their sizes are no sizes.
func kernelsOwn(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, err
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}

// addXattrs puts the extended attributes of what fd is of into h.
func addXattrs(h *tar.Header, fd int) error {
	list, err := xattr(func(b []byte) (int, error) { return unix.Listxattr(Proc(fd), b) })
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if name == "" || strings.Contains(name, "=") { // which no record can hold
			continue
		}
		value, err := xattr(func(b []byte) (int, error) { return unix.Getxattr(Proc(fd), name, b) })
		if err != nil {
			return err
		}
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords[files.XattrPrefix+name] = string(value)
	}
	return nil
}

// xattr calls get with room for what it has; nothing where the file system knows no
// such thing, or the attribute has gone.
func xattr(get func([]byte) (int, error)) ([]byte, error) {
	b := make([]byte, 512)
	n, err := get(b)
	if errors.Is(err, unix.ERANGE) {
		b = make([]byte, 64<<10) // XATTR_SIZE_MAX, XATTR_LIST_MAX
		n, err = get(b)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODATA) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}
