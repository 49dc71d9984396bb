package copies

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/beneath"
	"github.com/husk-containers/husk/protocols/files"
)

// dataLink is the symlink that the kubelet's atomic writer switches versions by.
const dataLink = "..data"

var (
	// errSwitched: the source has been switched to another version while it was
	// read. The change that did it is an event, too.
	errSwitched = errors.New("the source has changed while it was read")
	errKind     = fmt.Errorf("neither a directory, nor a file, nor a symlink, which is all that is copied: %w", errdefs.ErrInvalidArgument)
	// errVanished: the source is no more.
	errVanished = errors.New("the source has been removed from the host")
)

// AtomicWriter reports whether dir, which may be of O_PATH, is laid out as the
// kubelet's atomic writer leaves the directory of a configMap, secret, projected or
// downward API volume: "..data" is a symlink to a directory beside it whose name
// begins with "..".
func AtomicWriter(dir *os.File) (bool, error) {
	version, err := currentVersion(int(dir.Fd()))
	if err != nil || version == "" {
		return false, err
	}
	return isDir(int(dir.Fd()), version), nil
}

// isDir reports whether name is a directory in dir, and no symlink to one.
func isDir(dir int, name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// currentVersion is the sibling that "..data" in dir leads to; empty where there is
// no such symlink.
func currentVersion(dir int) (string, error) {
	leads, err := readlink(dir, dataLink)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTDIR) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read %s: %w", dataLink, err)
	}
	if leads == ".." || !strings.HasPrefix(leads, "..") || strings.Contains(leads, "/") {
		return "", nil
	}
	return leads, nil
}

// A snapshot is one reading of a source into an archive. No directory is kept open
// but the one that is read.
type snapshot struct {
	c        *Copy
	tar      *tar.Writer
	root     int
	todo     []string           // directories still to be read
	versions map[string]string  // by directory, what "..data" led to before it was read; the root's also where empty
	read     map[string]int     // directories that are in the archive whole, and how much they hold
	watches  map[int32]struct{} // that it has added, also after an error
	buf      []byte
}

func (c *Copy) snapshot() *snapshot {
	return &snapshot{
		c: c, versions: make(map[string]string), read: make(map[string]int), watches: make(map[int32]struct{}),
		buf: make([]byte, 64<<10),
	}
}

// write writes an archive of the source, as it was at one time: where the source is
// switched to another version meanwhile it is errSwitched. What vanishes otherwise
// is left out. Each directory is watched before it is read, so that no change is
// missed.
func (s *snapshot) write(w io.Writer) error {
	s.tar = tar.NewWriter(w)
	source := int(s.c.opts.Source.Fd())
	var st unix.Stat_t
	err := unix.Fstat(source, &st)
	if err != nil {
		return fmt.Errorf("read source: %w", err)
	}
	switch {
	case st.Nlink == 0:
		err = errVanished
	case st.Mode&unix.S_IFMT == unix.S_IFREG:
		err = s.file(source)
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		err = s.tree(source)
	default:
		err = errKind
	}
	if err == nil {
		err = s.tar.Close()
	}
	return err
}

// tree writes a source that is a directory.
func (s *snapshot) tree(source int) error {
	s.root = source
	s.todo = []string{"."}
	if err := s.entry(source, ".", "."); err != nil {
		return err
	}
	for len(s.todo) > 0 {
		dir := s.todo[len(s.todo)-1]
		s.todo = s.todo[:len(s.todo)-1]
		if err := s.list(dir); err != nil {
			return fmt.Errorf("read source %q: %w", dir, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(source, &st); err != nil {
		return err
	}
	if st.Nlink == 0 {
		return errVanished
	}
	if err := s.whole(); err != nil {
		return err
	}
	// A version does not change, and is not taken away before there is another: where
	// it has lost something the source is being removed, from within.
	before := s.c.version
	if now := s.version(); before.name != "" && (now.name == "" || now.name == before.name && now.files < before.files) {
		return errVanished
	}
	return nil
}

// A version is one of an atomic writer's, of the source itself.
type version struct {
	name  string // empty: there is none
	files int    // directly in it; 0 where it is missing
}

func (s *snapshot) version() version {
	name := s.versions["."]
	return version{name: name, files: s.read[name]}
}

// whole reports errSwitched unless every version that a "..data" leads to is the one
// that it led to before, and so has been there all the time, and is in the archive.
func (s *snapshot) whole() error {
	for dir, version := range s.versions {
		fd, err := beneath.Open(s.root, dir, unix.O_PATH|unix.O_DIRECTORY)
		if gone(err) {
			return errSwitched
		}
		if err != nil {
			return err
		}
		now, err := currentVersion(fd)
		there := version != "" && isDir(fd, version)
		unix.Close(fd)
		if err != nil {
			return err
		}
		_, whole := s.read[path.Join(dir, version)]
		if now != version || there && !whole {
			return errSwitched
		}
	}
	return nil
}

// list writes what is in a directory.
func (s *snapshot) list(dir string) error {
	fd, err := beneath.Open(s.root, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	if err := s.watch(fd); err != nil {
		return err
	}
	version, err := currentVersion(fd)
	if err != nil {
		return err
	}
	if version != "" || dir == "." {
		s.versions[dir] = version
	}
	names, err := d.Readdirnames(-1)
	if err != nil && !gone(err) {
		return err
	}
	slices.Sort(names)
	names = slices.Compact(names) // one that is renamed meanwhile may be listed twice
	for _, name := range names {
		if err := s.entry(fd, name, path.Join(dir, name)); err != nil && !gone(err) {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	s.read[dir] = len(names)
	return nil
}

func (s *snapshot) watch(fd int) error {
	wd, err := s.c.events.Add(fd, watched)
	if err == nil {
		s.watches[wd] = struct{}{}
	}
	return err
}

// gone reports an error of what was there, and no longer is.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// entry writes what base is in dir, and leaves what is in that for later.
func (s *snapshot) entry(dir int, base, name string) error {
	fd, err := beneath.Open(dir, base, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if name != "." {
			s.todo = append(s.todo, name)
		}
	case unix.S_IFREG:
		return s.content(fd, name)
	case unix.S_IFLNK:
	default:
		return errKind
	}
	h, err := files.Header(name, &st)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeSymlink {
		if h.Linkname, err = readlink(fd, ""); err != nil {
			return err
		}
	}
	return s.tar.WriteHeader(h)
}

// file writes a source that is a single file.
func (s *snapshot) file(source int) error {
	if err := s.watch(source); err != nil {
		return err
	}
	return s.content(source, ".")
}

// content writes the regular file that fd is of.
func (s *snapshot) content(fd int, name string) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	h, err := files.Header(name, &st)
	if err != nil {
		return err
	}
	if err := s.tar.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.CopyBuffer(s.tar, struct{ io.Reader }{io.LimitReader(f, st.Size)}, s.buf)
	if err == nil && n < st.Size { // it has been truncated since, which is an event
		err = errSwitched
	}
	return err
}

// readlink returns where the symlink base in dir leads; base is empty where dir is
// the symlink.
func readlink(dir int, base string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, base, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
