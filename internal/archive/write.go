// Package archive makes tars of the host's files, and files of tars that are not to be
// trusted.
package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Write writes the tar of the file or directory at source, under the name as. Where as
// is ".", of a directory is written what is in it, and not itself. Symbolic links are
// written as such, hard links within source too. What is neither of these is an error:
// a device or socket of the host means nothing in a container.
func Write(w io.Writer, source, as string) error {
	source, err := filepath.Abs(source)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Dir(source))
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // read only
	wr := writer{root: root, out: tar.NewWriter(w), links: map[inode]string{}}
	base := filepath.Base(source)
	if source == "/" {
		base = "."
	}
	if err := wr.add(base, as); err != nil {
		return fmt.Errorf("archive %s: %w", source, err)
	}
	return wr.out.Close()
}

type inode struct{ dev, ino uint64 }

type writer struct {
	root *os.Root
	out  *tar.Writer
	// links are the names of files that have more than one, by their inodes.
	links map[inode]string
}

// add writes what is at a path below the root under a name in the tar.
func (w *writer) add(file, name string) error {
	info, err := w.root.Lstat(file)
	if err != nil {
		return err
	}
	switch info.Mode().Type() {
	case 0:
		return w.addFile(file, name)
	case fs.ModeDir:
		if name != "." {
			if err := w.header(info, name+"/", ""); err != nil {
				return err
			}
		}
		return w.addEntries(file, name)
	case fs.ModeSymlink:
		target, err := w.root.Readlink(file)
		if err != nil {
			return err
		}
		return w.header(info, name, target)
	}
	return fmt.Errorf("%s is a %s, which is not copied: name what is beside it, or give a tar on standard input: %w",
		file, kind(info.Mode()), errdefs.ErrInvalidArgument)
}

func (w *writer) addEntries(file, name string) error {
	dir, err := w.root.Open(file)
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err := errors.Join(err, dir.Close()); err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		if err := w.add(path.Join(file, n), path.Join(name, n)); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) addFile(file, name string) error {
	// It may be a FIFO by now.
	f, err := w.root.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s has changed while it was copied: %w", file, errdefs.ErrAborted)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := w.links[id]; ok {
			h, err := tar.FileInfoHeader(info, "")
			if err != nil {
				return err
			}
			h.Typeflag, h.Size, h.Name, h.Linkname, h.Format = tar.TypeLink, 0, name, first, tar.FormatPAX
			return w.out.WriteHeader(h)
		}
		w.links[id] = name
	}
	if err := w.header(info, name, ""); err != nil {
		return err
	}
	// What is appended meanwhile is not part of it.
	n, err := io.CopyN(w.out, f, info.Size())
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s has shrunk from %d to %d bytes while it was copied: %w", file, info.Size(), n, errdefs.ErrAborted)
	}
	return err
}

func (w *writer) header(info fs.FileInfo, name, target string) error {
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	// Users' names are the host's; times of access and change are nobody's.
	h.Name, h.Format, h.Uname, h.Gname = name, tar.FormatPAX, "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	return w.out.WriteHeader(h)
}

// kind is a mode's type in words.
func kind(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "file"
	case m&fs.ModeDir != 0:
		return "directory"
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "FIFO"
	case m&fs.ModeCharDevice != 0:
		return "character device"
	case m&fs.ModeDevice != 0:
		return "block device"
	}
	return strings.TrimSpace("file of type " + m.Type().String())
}
