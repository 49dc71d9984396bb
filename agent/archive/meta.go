package archive

import (
	"archive/tar"
	"errors"
	"math"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/files"
)

// A Meta is what a file is but for its content.
type Meta struct {
	Mode     uint32 // the twelve bits
	UID, GID int
	MTime    unix.Timespec
}

// sparse begins the records of a file with holes, of which a few bytes would make
// terabytes here.
const sparse = "GNU.sparse."

// MetaOf returns what h says. The error is InvalidArgument, also for a file that the
// archive has as a sparse one.
func MetaOf(h *tar.Header) (Meta, error) {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, sparse) {
			return Meta{}, Invalid("%q: sparse files are not supported, archive it without", h.Name)
		}
	}
	if h.Uid < 0 || h.Gid < 0 || h.Uid >= math.MaxUint32 || h.Gid >= math.MaxUint32 {
		return Meta{}, Invalid("%q: owner %d:%d", h.Name, h.Uid, h.Gid)
	}
	mtime, err := unix.TimeToTimespec(h.ModTime)
	if err != nil {
		return Meta{}, Invalid("%q: time %s", h.Name, h.ModTime)
	}
	return Meta{Mode: uint32(h.Mode & 0o7777), UID: h.Uid, GID: h.Gid, MTime: mtime}, nil
}

func (m Meta) ownedAs(st *unix.Stat_t) bool { return int(st.Uid) == m.UID && int(st.Gid) == m.GID }

// Set gives what fd, which may be of O_PATH, is of its owner, mode, extended
// attributes and time, in an order in which none takes back another. What is right
// already is not touched: a watcher would be told.
func (m Meta) Set(fd int, xattrs map[string]string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if !m.ownedAs(&st) {
		if err := unix.Fchownat(fd, "", m.UID, m.GID, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK && st.Mode&0o7777 != m.Mode {
		if err := unix.Chmod(Proc(fd), m.Mode); err != nil {
			return err
		}
	}
	for name, value := range xattrs {
		err := unix.Setxattr(Proc(fd), name, []byte(value), 0)
		// What the file system has no room for by its kind, or shares of the host do
		// not allow, is left out, as by any program that copies.
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPERM) {
			return err
		}
	}
	return m.SetTime(fd)
}

// SetTime gives what fd is of its time.
func (m Meta) SetTime(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mtim == m.MTime {
		return err
	}
	// With one of both times alone watchers would be told of new content.
	times := []unix.Timespec{st.Atim, m.MTime}
	return unix.UtimesNanoAt(fd, "", times, unix.AT_EMPTY_PATH)
}

// xattrsOf are the extended attributes that an archive has for an entry.
func xattrsOf(h *tar.Header) map[string]string {
	var all map[string]string
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, files.XattrPrefix); ok {
			if all == nil {
				all = make(map[string]string)
			}
			all[name] = value
		}
	}
	return all
}
