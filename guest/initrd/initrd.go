// Package initrd writes initial RAM disks: uncompressed cpio archives in the
// newc format that the Linux kernel unpacks at boot. The same entries give the
// same bytes, whatever their order.
package initrd

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"slices"
)

// An Entry is one file, directory, symbolic link or device of an archive. It
// belongs to root and its modification time is the epoch.
type Entry struct {
	// path within the archive: relative, clean, slash-separated.
	path string
	// mode as in the archive: the type's S_IF bits and the permissions.
	mode uint32
	// data is the content of a file, or the target of a symbolic link.
	data []byte
	// links is the number of hard links that stat shows.
	links uint32
	// major and minor number of a device.
	major, minor uint32
}

// The file types of stat(2), in the mode of a cpio header.
const (
	typeMask       = 0o170000
	typeCharDevice = 0o020000
	typeDir        = 0o040000
	typeFile       = 0o100000
	typeSymlink    = 0o120000
)

// File is a regular file with the permissions perm.
func File(path string, perm fs.FileMode, data []byte) Entry {
	return Entry{path: path, mode: typeFile | uint32(perm.Perm()), data: data, links: 1}
}

// Dir is a directory with the permissions perm. Write adds the parents of every
// entry by itself, with 0755; a Dir is for an empty directory or other
// permissions. perm may hold fs.ModeSticky.
func Dir(path string, perm fs.FileMode) Entry {
	mode := typeDir | uint32(perm.Perm())
	if perm&fs.ModeSticky != 0 {
		mode |= 0o1000
	}
	return Entry{path: path, mode: mode, links: 2}
}

// Symlink is a symbolic link to target.
func Symlink(path, target string) Entry {
	return Entry{path: path, mode: typeSymlink | 0o777, data: []byte(target), links: 1}
}

// CharDevice is a character device node with the permissions perm.
func CharDevice(path string, perm fs.FileMode, major, minor uint32) Entry {
	return Entry{path: path, mode: typeCharDevice | uint32(perm.Perm()), links: 1, major: major, minor: minor}
}

// Write writes an archive of the entries to w. It fails on a path that is not
// relative and clean, on two entries with one path, on an entry below one that
// is no directory, and on content that the format cannot hold (4 GiB and more).
func Write(w io.Writer, entries ...Entry) error {
	sorted, err := arrange(entries)
	if err != nil {
		return err
	}
	cw := &writer{w: bufio.NewWriter(w)}
	for _, e := range sorted {
		cw.entry(e)
	}
	cw.trailer()
	return cw.w.Flush()
}

// arrange returns the entries with their missing parents, sorted by path, which
// puts each directory before what it holds.
func arrange(entries []Entry) ([]Entry, error) {
	byPath := make(map[string]Entry, len(entries))
	for _, e := range entries {
		if err := e.validate(); err != nil {
			return nil, fmt.Errorf("add %q to initrd: %w", e.path, err)
		}
		if _, ok := byPath[e.path]; ok {
			return nil, fmt.Errorf("add %q to initrd: path is there already", e.path)
		}
		byPath[e.path] = e
	}
	for _, e := range entries {
		for dir := path.Dir(e.path); dir != "."; dir = path.Dir(dir) {
			parent, ok := byPath[dir]
			if !ok {
				byPath[dir] = Dir(dir, 0o755)
			} else if parent.mode&typeMask != typeDir {
				return nil, fmt.Errorf("add %q to initrd: %q is not a directory", e.path, dir)
			}
		}
	}
	sorted := make([]Entry, 0, len(byPath))
	for _, e := range byPath {
		sorted = append(sorted, e)
	}
	slices.SortFunc(sorted, func(a, b Entry) int { return cmp.Compare(a.path, b.path) })
	return sorted, nil
}

// maxPath is the kernel's PATH_MAX, which counts the terminating zero. The
// kernel skips an entry with a longer name, or a longer link target, in silence.
const maxPath = 4096

func (e Entry) validate() error {
	switch {
	case !fs.ValidPath(e.path) || e.path == ".":
		return errors.New("path is not relative and clean")
	case e.path == trailerName:
		return errors.New("path is the archive's end mark")
	case len(e.path) >= maxPath:
		return fmt.Errorf("path is longer than %d bytes", maxPath-1)
	case slices.Contains([]byte(e.path), 0):
		return errors.New("path holds a zero byte")
	case e.mode&typeMask == typeSymlink && (len(e.data) == 0 || len(e.data) >= maxPath):
		return fmt.Errorf("link target is empty or longer than %d bytes", maxPath-1)
	case int64(len(e.data)) > math.MaxUint32:
		return errors.New("content is 4 GiB or larger")
	}
	return nil
}
