package files

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/archive"
	"github.com/husk-containers/husk/internal/beneath"
)

// self is the entry that is the target itself.
const self = "."

// A tree is one sync. What its archive has and the copy has not is first made in
// the stage: a new directory whole, a new or changed file, a new or changed symlink.
// When all of it is there commit moves it into place:
//
//  1. files and directories, in the archive's order
//  2. owners, modes and times of what stays
//  3. symlinks whose names begin with "..", then the others
//  4. what no longer is in the archive goes
//  5. times of directories
//
// So where a directory is switched to by a symlink, as the kubelet does with
// "..data", it is whole before, and the one before it goes after. Each step is one
// rename of one name: watchers of the directory are told as they are of a rename on
// the host, and never of something half written. What is unchanged is not touched,
// and keeps its inode, which a container may have mounted.
type tree struct {
	copies int // the directory of all copies
	stage  int // a directory of this sync's own
	name   string

	entries map[string]*entry // by name below the target
	moves   []string          // files and directories to move into place
	links   []string          // symlinks likewise
	keep    []string          // not touched, or their metas alone
	dirs    []string          // new ones, whose times are last
	count   int               // of what is in the stage

	parent parentDir
	ahead  [2][]byte // buffers of same
}

// An entry is one of the archive's.
type entry struct {
	archive.Meta
	dir bool
	// staged is where it is in the stage; empty: it is in the copy.
	staged string
}

// A parentDir is the directory of which an entry was last.
type parentDir struct {
	fd   int
	root int
	name string
}

func newTree(copies, stage int, name string) *tree {
	return &tree{copies: copies, stage: stage, name: name, entries: make(map[string]*entry), parent: parentDir{fd: -1}}
}

func (t *tree) close() {
	if t.parent.fd >= 0 {
		unix.Close(t.parent.fd)
	}
}

// open returns a directory, which stays the tree's.
func (t *tree) open(root int, name string) (int, error) {
	if p := t.parent; p.fd >= 0 && p.root == root && p.name == name {
		return p.fd, nil
	}
	fd, err := beneath.Open(root, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	t.close()
	t.parent = parentDir{fd: fd, root: root, name: name}
	return fd, nil
}

// kept returns the directory of the copy that name is in, and what it is called
// there.
func (t *tree) kept(name string) (dir int, base string, err error) {
	full := path.Join(t.name, name)
	dir, err = t.open(t.copies, path.Dir(full))
	return dir, path.Base(full), err
}

// read takes in an archive up to its end, which is the host's word that it is
// whole.
func (t *tree) read(body io.Reader) error {
	for r := tar.NewReader(body); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return archive.Broken(err)
		}
		if err := t.add(h, r); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, body); err != nil {
		return archive.Broken(err)
	}
	if len(t.entries) == 0 {
		return archive.Invalid("the archive is empty")
	}
	for i := len(t.dirs) - 1; i >= 0; i-- {
		e := t.entries[t.dirs[i]]
		if err := archive.At(t.stage, e.staged, e.SetTime); err != nil {
			return archive.Failed("set time of", t.dirs[i], err)
		}
	}
	return nil
}

// add takes in one entry.
func (t *tree) add(h *tar.Header, body io.Reader) error {
	name := strings.TrimSuffix(h.Name, "/")
	if !filepath.IsLocal(name) || path.Clean(name) != name || strings.ContainsRune(name, 0) {
		return archive.Invalid("%q is not a clean path below the target", h.Name)
	}
	if t.entries[name] != nil {
		return archive.Invalid("%q is in the archive twice", name)
	}
	e := &entry{dir: h.Typeflag == tar.TypeDir}
	var err error
	if e.Meta, err = archive.MetaOf(h); err != nil {
		return err
	}
	if name == self {
		if h.Typeflag != tar.TypeReg && !e.dir {
			return archive.Invalid("the target is neither a directory nor a file")
		}
	} else if above := t.entries[path.Dir(name)]; above == nil || !above.dir {
		return archive.Invalid("%q is in no directory of the archive", name)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = t.addDir(name, e)
	case tar.TypeReg:
		err = t.addFile(name, e, h.Size, body)
	case tar.TypeSymlink:
		err = t.addLink(name, e, h.Linkname)
	default:
		return archive.Invalid("%q is neither a directory, nor a file, nor a symlink", name)
	}
	if err != nil {
		return archive.Failed("copy", name, err)
	}
	t.entries[name] = e
	return nil
}

// existing returns what the copy has at name; a zero Mode where it has nothing.
func (t *tree) existing(name string) (dir int, base string, st unix.Stat_t, err error) {
	if name != self && t.entries[path.Dir(name)].staged != "" {
		return -1, "", st, nil
	}
	dir, base, err = t.kept(name)
	if err == nil {
		err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if errors.Is(err, unix.ENOENT) {
		err = nil
		st = unix.Stat_t{}
	}
	return dir, base, st, err
}

// place decides on where in the stage a new entry is made: in its directory where
// that is new too, else by itself, to be moved.
func (t *tree) place(name string, e *entry, moves *[]string) (dir int, base string, err error) {
	if name != self {
		if above := t.entries[path.Dir(name)].staged; above != "" {
			e.staged = path.Join(above, path.Base(name))
			dir, err = t.open(t.stage, above)
			return dir, path.Base(name), err
		}
	}
	e.staged = strconv.Itoa(t.count)
	t.count++
	*moves = append(*moves, name)
	return t.stage, e.staged, nil
}

func (t *tree) addDir(name string, e *entry) error {
	_, _, st, err := t.existing(name)
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		t.keep = append(t.keep, name)
		return nil
	case unix.S_IFREG:
		if name == self {
			return fmt.Errorf("the copy is a file: %w", errdefs.ErrFailedPrecondition)
		}
	}
	dir, base, err := t.place(name, e, &t.moves)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(dir, base, 0o700); err != nil {
		return err
	}
	t.dirs = append(t.dirs, name)
	return archive.At(dir, base, func(fd int) error { return e.Set(fd, nil) })
}

func (t *tree) addLink(name string, e *entry, leads string) error {
	dir, base, st, err := t.existing(name)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if old, err := archive.Readlink(dir, base); err == nil && old == leads {
			t.keep = append(t.keep, name)
			return nil
		}
	}
	if dir, base, err = t.place(name, e, &t.links); err != nil {
		return err
	}
	if err := unix.Symlinkat(leads, dir, base); err != nil {
		return err
	}
	return archive.At(dir, base, func(fd int) error { return e.Set(fd, nil) })
}

func (t *tree) addFile(name string, e *entry, size int64, body io.Reader) error {
	dir, base, st, err := t.existing(name)
	if err != nil {
		return err
	}
	var old *os.File
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		fd, err := beneath.Open(dir, base, unix.O_RDONLY)
		if err != nil {
			return err
		}
		old = os.NewFile(uintptr(fd), base)
		defer old.Close()
	case unix.S_IFDIR:
		if name == self {
			return fmt.Errorf("the copy is a directory: %w", errdefs.ErrFailedPrecondition)
		}
	}
	var alike int64
	var differs []byte
	if old != nil && st.Size == size {
		if alike, differs, err = t.same(old, body); err != nil {
			return err
		}
		if alike == size {
			t.keep = append(t.keep, name)
			return nil
		}
	}
	if dir, base, err = t.place(name, e, &t.moves); err != nil {
		return err
	}
	fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	content := body
	if alike > 0 || differs != nil { // else there may be no file to read from
		content = io.MultiReader(io.NewSectionReader(old, 0, alike), bytes.NewReader(differs), body)
	}
	if n, err := io.Copy(f, content); err != nil {
		return archive.Broken(err)
	} else if n != size { // the old file has been changed meanwhile, in the guest
		return fmt.Errorf("%d bytes of %d: %w", n, size, errdefs.ErrAborted)
	}
	return e.Set(fd, nil)
}

// same compares what is to come with what there is. It returns how many bytes are
// alike, and what of body it has read beyond them.
func (t *tree) same(old, body io.Reader) (alike int64, differs []byte, err error) {
	if t.ahead[0] == nil {
		t.ahead = [2][]byte{make([]byte, 64<<10), make([]byte, 64<<10)}
	}
	for {
		n, err := io.ReadFull(body, t.ahead[0])
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, nil, err
		}
		if n == 0 {
			return alike, nil, nil
		}
		m, _ := io.ReadFull(old, t.ahead[1][:n]) // what cannot be read is not the same
		if !bytes.Equal(t.ahead[0][:n], t.ahead[1][:m]) {
			return alike, t.ahead[0][:n], nil
		}
		alike += int64(n)
	}
}
