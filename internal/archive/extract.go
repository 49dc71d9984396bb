package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// A Target is where a tar goes on the host.
type Target struct {
	// Dir is an existing directory.
	Dir string
	// Name is what the tar's first entry is called in Dir, whatever the tar calls it;
	// ".": it is Dir itself.
	Name string
	// Want is what the first entry must be.
	Want Want
}

// Want is what a tar's first entry must be.
type Want int

// What may be wanted.
const (
	Anything Want = iota
	Directory
	NoDirectory
)

// maxPath is Linux's PATH_MAX.
const maxPath = 4096

// Limits bound what a tar may hold.
type Limits struct {
	Entries int
	Bytes   int64 // of files
}

// Extract makes files of a tar that somebody wrote who is not to be trusted. The tar is of
// one file, or of one directory and what is in it; what it says of any other place is an
// error, and so is an entry of a kind that Write does not write. Nothing is written
// through a symbolic link, neither one of the tar nor one that was there, nor into a
// file that was there: it is replaced. A directory that was there stays as it is, but for
// what it gets.
//
// Set-user-ID and set-group-ID bits and extended attributes are left out: they would
// give the tar's writer power on the host. Owners are the tar's where the caller is
// root. What was extracted before an error stays.
func Extract(r io.Reader, t Target, l Limits) error {
	root, err := os.OpenRoot(t.Dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // read only
	x := extraction{root: root, target: t, limits: l, asRoot: os.Geteuid() == 0, checked: "."}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF) && n == 0:
			return fmt.Errorf("the container's tar is empty: %w", errdefs.ErrInvalidArgument)
		case errors.Is(err, io.EOF):
			return x.settle()
		case err != nil:
			return fmt.Errorf("read the container's tar: %w", err)
		case n >= l.Entries:
			return fmt.Errorf("the container's tar has more than %d entries: %w", l.Entries, errdefs.ErrResourceExhausted)
		case h.Typeflag == tar.TypeXGlobalHeader: // a comment
			continue
		}
		if err := x.extract(h, tr); err != nil {
			return fmt.Errorf("the container's tar: entry %.300q: %w", h.Name, err)
		}
	}
}

type extraction struct {
	root   *os.Root
	target Target
	limits Limits
	bytes  int64
	asRoot bool
	base   string // the name of the first entry; empty before that
	alone  bool   // the first entry is no directory
	// checked is a directory that is reached without symbolic links. None of its
	// elements becomes one: directories are not replaced.
	checked string
	// made are the directories that were made, whose names have named bytes. They get
	// their modes and times at the end: what is put in changes them.
	made  []tar.Header
	named int
}

// maxNamed bounds the names that are kept. Directories beyond get their times at once.
const maxNamed = 16 << 20

// refuse is the error of an entry that nobody has written in good faith.
func refuse(format string, args ...any) error {
	return fmt.Errorf(format+": refused: %w", append(args, errdefs.ErrPermissionDenied)...)
}

func (x *extraction) extract(h *tar.Header, content io.Reader) error {
	file, err := x.place(h)
	if err != nil {
		return err
	}
	if err := x.check(path.Dir(file)); err != nil {
		return err
	}
	sparse := h.Typeflag == tar.TypeGNUSparse
	for record := range h.PAXRecords {
		sparse = sparse || strings.HasPrefix(record, "GNU.sparse.")
	}
	if sparse {
		return refuse("it has holes, which could be of any size")
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return x.directory(h, file)
	case tar.TypeReg:
		return x.file(h, file, content)
	case tar.TypeSymlink:
		if err := x.clear(file); err != nil {
			return err
		}
		if err := x.root.Symlink(h.Linkname, file); err != nil {
			return err
		}
		return x.own(h, file)
	case tar.TypeLink:
		return x.link(h, file)
	}
	return refuse("it is a %s, not a file, directory or link; with \"-\" as the destination the tar comes as it is", kind(h.FileInfo().Mode()))
}

// place is the path of an entry below the root.
func (x *extraction) place(h *tar.Header) (string, error) {
	name, err := clean(h.Name)
	if err != nil {
		return "", err
	}
	if x.base != "" {
		if x.alone {
			return "", refuse("it comes after a first entry that is no directory")
		}
		return x.below(name)
	}
	isDir := h.Typeflag == tar.TypeDir
	switch {
	case strings.Contains(name, "/"):
		return "", refuse("it is the first, and so must be a name, not a path")
	case isDir && x.target.Want == NoDirectory:
		return "", fmt.Errorf("a directory cannot take the place of %s, which is none: %w", path.Join(x.target.Dir, x.target.Name), errdefs.ErrInvalidArgument)
	case !isDir && x.target.Want == Directory:
		return "", fmt.Errorf("it is no directory, and %s does not exist as one: make it, or leave out the slash for a file of that name: %w", path.Join(x.target.Dir, x.target.Name), errdefs.ErrInvalidArgument)
	}
	x.base, x.alone = name, !isDir
	return x.target.Name, nil
}

// below is the path below the root of a name in the tar, which must lie in its first
// directory.
func (x *extraction) below(name string) (string, error) {
	rest := name
	if x.base != "." && name != x.base {
		var in bool
		if rest, in = strings.CutPrefix(name, x.base+"/"); !in {
			return "", refuse("%.300q is not in %.300q", name, x.base)
		}
	} else if name == x.base {
		rest = ""
	}
	return path.Join(x.target.Name, rest), nil
}

// clean is a name in a tar as a path without tricks. Any byte may be in it.
func clean(name string) (string, error) {
	trimmed := strings.TrimPrefix(strings.TrimRight(name, "/"), "./")
	if trimmed == "." {
		return trimmed, nil
	}
	bad := len(trimmed) > maxPath
	for element := range strings.SplitSeq(trimmed, "/") {
		bad = bad || element == "" || element == "." || element == ".." || strings.Contains(element, "\x00")
	}
	if bad {
		return "", refuse("%.300q is not a path within a directory", name)
	}
	return trimmed, nil
}

// check makes sure that a directory below the root is reached without symbolic links.
func (x *extraction) check(dir string) error {
	if dir == x.checked {
		return nil
	}
	if dir != "." {
		if err := x.check(path.Dir(dir)); err != nil {
			return err
		}
		info, err := x.root.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return refuse("its directory %.300q has not come before it", dir)
		}
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return refuse("it lies below %.300q, which is a %s", dir, kind(info.Mode()))
		}
	}
	x.checked = dir
	return nil
}

// settle gives the directories that were made what they were to have, those first that
// came last.
func (x *extraction) settle() error {
	for _, h := range slices.Backward(x.made) {
		if err := errors.Join(x.own(&h, h.Name), x.root.Chmod(h.Name, mode(&h)), x.root.Chtimes(h.Name, h.ModTime, h.ModTime)); err != nil {
			return err
		}
	}
	x.made, x.named = x.made[:0], 0
	return nil
}

func (x *extraction) directory(h *tar.Header, file string) error {
	err := x.root.Mkdir(file, 0o700)
	if err == nil {
		// A header whole may be large.
		x.made = append(x.made, tar.Header{Name: file, Typeflag: tar.TypeDir, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime})
		if x.named += len(file); x.named > maxNamed {
			return x.settle()
		}
		return nil
	}
	info, serr := x.root.Lstat(file)
	switch {
	case !errors.Is(err, fs.ErrExist) || serr != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s exists and is a %s, not a directory: %w", file, kind(info.Mode()), errdefs.ErrAlreadyExists)
	}
	return nil
}

func (x *extraction) file(h *tar.Header, file string, content io.Reader) (err error) {
	if h.Size > x.limits.Bytes-x.bytes {
		return fmt.Errorf("with it the tar has more than %d bytes: %w", x.limits.Bytes, errdefs.ErrResourceExhausted)
	}
	x.bytes += h.Size
	if err := x.clear(file); err != nil {
		return err
	}
	f, err := x.root.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil { // a part of a file is none
			err = errors.Join(err, x.root.Remove(file))
		}
	}()
	_, err = io.Copy(f, content)
	if err == nil {
		err = x.own(h, file)
	}
	if err == nil {
		err = f.Chmod(mode(h))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return x.root.Chtimes(file, h.ModTime, h.ModTime)
}

// link makes a hard link to what the tar has written, or what is in its directory.
func (x *extraction) link(h *tar.Header, file string) error {
	name, err := clean(h.Linkname)
	if err != nil {
		return err
	}
	if x.alone {
		return refuse("it is the only entry, and a hard link")
	}
	source, err := x.below(name)
	if err != nil {
		return err
	}
	if err := x.check(path.Dir(source)); err != nil {
		return err
	}
	info, err := x.root.Lstat(source)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || source == file {
		return refuse("it is a hard link to %.300q, which is a %s", h.Linkname, kind(info.Mode()))
	}
	if err := x.clear(file); err != nil {
		return err
	}
	return x.root.Link(source, file)
}

// clear removes what is in an entry's place, unless that is a directory.
func (x *extraction) clear(file string) error {
	info, err := x.root.Lstat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("%s exists and is a directory: %w", file, errdefs.ErrAlreadyExists)
	}
	return x.root.Remove(file)
}

func (x *extraction) own(h *tar.Header, file string) error {
	if !x.asRoot {
		return nil
	}
	return x.root.Lchown(file, h.Uid, h.Gid)
}

// mode is an entry's without what gives power.
func mode(h *tar.Header) fs.FileMode { return h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSticky) }
