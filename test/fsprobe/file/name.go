package file

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// names is every byte that a name may hold, and the longest names.
func names(t *try.T) error {
	var made []string
	for b := 1; b < 256; b++ {
		if b == '/' {
			continue
		}
		name := "byte" + string([]byte{byte(b)})
		path, err := t.File(name, name)
		if err != nil {
			t.Say(fmt.Sprintf("byte %d", b), try.Result(err))
			continue
		}
		if data, err := os.ReadFile(path); string(data) != name {
			t.Say(fmt.Sprintf("contents with byte %d", b), try.Text(data)+try.Result(err))
		}
		made = append(made, name)
	}
	for _, name := range []string{strings.Repeat("n", 255), strings.Repeat("\xff", 255), "...", " ", "-rf", "a\nb"} {
		if _, err := t.File(name, ""); err != nil {
			t.Say(fmt.Sprintf("name %.10q of %d bytes", name, len(name)), try.Result(err))
		}
		made = append(made, name)
	}
	_, err := t.File(strings.Repeat("n", 256), "")
	t.Say("256 bytes", try.Result(err))
	entries, err := os.ReadDir(t.Dir)
	if err != nil {
		return err
	}
	var listed []string
	for _, e := range entries {
		listed = append(listed, e.Name())
	}
	slices.Sort(made)
	slices.Sort(listed)
	t.Say("listed as made", try.Yes(slices.Equal(made, listed))+", "+fmt.Sprint(len(listed)))
	return nil
}

func symlink(t *try.T) error {
	read := func(name string) string {
		target, err := os.Readlink(t.Path(name))
		if err != nil {
			return try.Result(err)
		}
		return try.Text([]byte(target))
	}
	t.Say("4095 bytes", try.Result(os.Symlink(strings.Repeat("x", 4095), t.Path("long")))+", "+read("long")+", "+try.Size(t.Path("long")))
	t.Say("4096 bytes", try.Result(os.Symlink(strings.Repeat("x", 4096), t.Path("longer"))))
	t.Say("empty", try.Result(os.Symlink("", t.Path("empty"))))
	t.Say("odd bytes", try.Result(os.Symlink("\x01\xff\n", t.Path("odd")))+", "+read("odd"))
	t.Say("loop", try.Result(os.Symlink("loop", t.Path("loop")))+", "+try.Contents(t.Path("loop")))
	t.Say("dangling", try.Result(os.Symlink("nowhere", t.Path("dangling")))+", "+try.Contents(t.Path("dangling")))
	t.Say("create through a dangling one", try.Result(os.WriteFile(t.Path("dangling"), []byte("made"), 0o600))+", "+try.Contents(t.Path("nowhere")))
	t.Say("mode", try.Mode(t.Path("dangling")))
	t.Say("chmod of one", try.Result(unix.Fchmodat(unix.AT_FDCWD, t.Path("dangling"), 0o600, 0))+", "+try.Mode(t.Path("nowhere")))
	t.Say("over an existing name", try.Result(os.Symlink("x", t.Path("nowhere"))))
	t.Say("readlink of a file", read("nowhere"))
	last := "nowhere"
	for i := range 41 {
		name := fmt.Sprint("chain", i)
		if err := os.Symlink(last, t.Path(name)); err != nil {
			return err
		}
		last = name
	}
	t.Say("chain of 40", try.Contents(t.Path("chain39")))
	t.Say("chain of 41", try.Contents(t.Path("chain40")))
	return nil
}

func hardLink(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	for _, dir := range []string{"a", "b"} {
		if err := os.Mkdir(t.Path(dir), 0o755); err != nil {
			return err
		}
	}
	t.Say("into another directory", try.Result(os.Link(path, t.Path("a/link"))))
	t.Say("of a link, into a third", try.Result(os.Link(t.Path("a/link"), t.Path("b/link"))))
	facts := func(name string) string {
		var st, first unix.Stat_t
		if err := errors.Join(unix.Lstat(t.Path(name), &st), unix.Lstat(t.Path("b/link"), &first)); err != nil {
			return try.Result(err)
		}
		return fmt.Sprintf("%d links, the same: %s", st.Nlink, try.Yes(st.Ino == first.Ino && st.Dev == first.Dev))
	}
	t.Say("links", facts("file")+", "+facts("a/link"))
	t.Say("write by one name", try.Result(os.WriteFile(t.Path("a/link"), []byte("changed"), 0o600))+", "+try.Contents(path))
	t.Say("mode by one name", try.Result(os.Chmod(t.Path("b/link"), 0o640))+", "+try.Mode(path))
	t.Say("unlink the first", try.Result(os.Remove(path))+", "+facts("a/link")+", "+try.Contents(t.Path("b/link")))
	t.Say("rename onto another name of the same", try.Result(unix.Rename(t.Path("a/link"), t.Path("b/link")))+", "+facts("a/link"))
	t.Say("over an existing name", try.Result(os.Link(t.Path("a/link"), t.Path("b/link"))))
	t.Say("of a directory", try.Result(os.Link(t.Path("a"), t.Path("c"))))
	t.Say("of a missing name", try.Result(os.Link(t.Path("none"), t.Path("c"))))
	if err := os.Symlink("link", t.Path("a/symlink")); err != nil {
		return err
	}
	t.Say("of a symbolic link", try.Result(os.Link(t.Path("a/symlink"), t.Path("b/symlink")))+", "+try.Mode(t.Path("b/symlink")))
	for i := range 200 {
		if err := os.Link(t.Path("a/link"), t.Path(fmt.Sprint("b/link", i))); err != nil {
			return err
		}
	}
	t.Say("200 more", facts("a/link"))
	var st unix.Stat_t
	if err := unix.Stat(t.Path("a"), &st); err != nil {
		return err
	}
	t.Say("links of a directory", fmt.Sprint(st.Nlink))
	return nil
}

func rename(t *try.T) error {
	for _, dir := range []string{"empty", "full", "full/below"} {
		if err := os.Mkdir(t.Path(dir), 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"old", "new", "full/file"} {
		if _, err := t.File(name, name); err != nil {
			return err
		}
	}
	f, err := os.Open(t.Path("old"))
	if err != nil {
		return err
	}
	defer f.Close()
	mapped, err := unix.Mmap(int(f.Fd()), 0, 3, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	t.Say("over an open file", try.Result(unix.Rename(t.Path("new"), t.Path("old")))+", "+try.Contents(t.Path("old"))+", "+try.Contents(t.Path("new")))
	data, err := io.ReadAll(f)
	t.Say("the open file", try.Text(data)+", "+try.Result(err)+", mapped "+try.Text(mapped))
	var st unix.Stat_t
	t.Say("its links", try.Result(unix.Fstat(int(f.Fd()), &st))+", "+fmt.Sprint(st.Nlink))
	for _, c := range [][2]string{
		{"full", "empty"},
		{"empty", "old"},
		{"old", "empty"},
		{"empty/below", "old"},
		{"empty", "empty/below/deeper"},
		{"none", "old"},
		{"old", "none/x"},
		{"old", "old"},
		{"old", "empty/below/old"},
		{"empty/file", "moved"},
		{"empty/below/old", "moved/"},
		{"empty", "renamed"},
		{"renamed/.", "other"},
	} {
		t.Say(c[0]+" to "+c[1], try.Result(unix.Rename(t.Dir+"/"+c[0], t.Dir+"/"+c[1])))
	}
	t.Say("left", tree(t.Dir))
	return nil
}

// tree lists all names below a directory.
func tree(dir string) string {
	var list []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(dir, path)
		list = append(list, rel)
		return errors.Join(err, relErr)
	})
	if err != nil {
		return try.Result(err)
	}
	return strings.Join(list[1:], " ")
}

func renameFlags(t *try.T) error {
	if err := os.Mkdir(t.Path("dir"), 0o755); err != nil {
		return err
	}
	for _, name := range []string{"a", "b"} {
		if _, err := t.File(name, name); err != nil {
			return err
		}
	}
	at := func(from, to string, flags uint) string {
		return try.Result(unix.Renameat2(unix.AT_FDCWD, t.Path(from), unix.AT_FDCWD, t.Path(to), flags))
	}
	t.Say("NOREPLACE over a file", at("a", "b", unix.RENAME_NOREPLACE))
	t.Say("NOREPLACE", at("a", "c", unix.RENAME_NOREPLACE)+", "+try.Contents(t.Path("c")))
	t.Say("EXCHANGE", at("b", "c", unix.RENAME_EXCHANGE)+", "+try.Contents(t.Path("b"))+", "+try.Contents(t.Path("c")))
	t.Say("EXCHANGE with a directory", at("b", "dir", unix.RENAME_EXCHANGE)+", "+try.Contents(t.Path("dir")))
	t.Say("EXCHANGE with nothing", at("b", "none", unix.RENAME_EXCHANGE))
	t.Say("both", at("b", "c", unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE))
	t.Say("WHITEOUT", at("c", "d", unix.RENAME_WHITEOUT)+", "+try.Mode(t.Path("c")))
	t.Say("unknown", at("c", "d", 1<<10))
	return nil
}

// deep goes far below what a path can name.
func deep(t *try.T) error {
	const levels = 64
	name := strings.Repeat("d", 200)
	fd, err := unix.Open(t.Dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	fds := []int{fd}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd) //nolint:errcheck // a directory
		}
	}()
	for i := range levels {
		below, err := -1, unix.Mkdirat(fd, name, 0o755)
		if err == nil {
			below, err = unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		}
		if err != nil {
			t.Say(fmt.Sprintf("level %d", i), try.Result(err))
			break
		}
		fd = below
		fds = append(fds, fd)
	}
	file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	t.Say("file at the bottom", try.Result(err))
	if err == nil {
		_, err = unix.Write(file, []byte("deep"))
		t.Say("write there", try.Result(errors.Join(err, unix.Close(file))))
	}
	var st unix.Stat_t
	t.Say("stat there", try.Result(unix.Fstatat(fd, "file", &st, 0))+", "+fmt.Sprint(st.Size))
	long := t.Dir + strings.Repeat("/"+name, levels)
	t.Say("by its path", try.Result(unix.Stat(long, &st)))
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	t.Say("path of the descriptor", try.Yes(link != "")+", "+try.Result(err))
	up, err := unix.Openat(fd, strings.Repeat("../", levels), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	var top, again unix.Stat_t
	if err == nil {
		err = errors.Join(unix.Fstat(up, &again), unix.Fstat(fds[0], &top), unix.Close(up))
	}
	t.Say("up again", try.Result(err)+", the same: "+try.Yes(top.Ino == again.Ino && top.Dev == again.Dev))
	t.Say("unlink there", try.Result(unix.Unlinkat(fd, "file", 0)))
	for i := len(fds) - 2; i >= 0; i-- {
		if err := unix.Unlinkat(fds[i], name, unix.AT_REMOVEDIR); err != nil {
			t.Say(fmt.Sprintf("remove level %d", i), try.Result(err))
			break
		}
	}
	t.Say("left", tree(t.Dir+"/."))
	return nil
}

// directory is one of many entries that is read while it changes.
func directory(t *try.T) error {
	const entries = 700
	for i := range entries {
		if err := os.Mkdir(t.Path(fmt.Sprintf("entry-%05d", i)), 0o755); err != nil {
			return err
		}
	}
	fd, err := unix.Open(t.Dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // read-only
	first, err := list(fd, nil)
	t.Say("first reading", try.Result(err)+", "+summary(first))
	for _, at := range []int{0, 1, entries / 2, entries - 1} {
		_, err := unix.Seek(fd, first[at].off, io.SeekStart)
		if err != nil {
			t.Say("seek", try.Result(err))
			continue
		}
		rest, err := list(fd, nil)
		t.Say(fmt.Sprintf("after a seek to entry %d", at), try.Result(err)+", as before: "+try.Yes(slices.Equal(rest, first[at+1:])))
	}
	_, err = unix.Seek(fd, 0, io.SeekStart)
	t.Say("rewind", try.Result(err))
	gone, err := list(fd, func(name string) error { return unix.Unlinkat(fd, name, unix.AT_REMOVEDIR) })
	t.Say("read and remove", try.Result(err)+", "+summary(gone))
	t.Say("left", tree(t.Dir))
	var st unix.Stat_t
	t.Say("links", try.Result(unix.Fstat(fd, &st))+", "+fmt.Sprint(st.Nlink))
	t.Say("remove", try.Result(unix.Rmdir(t.Dir)))
	again, err := list(fd, nil)
	t.Say("read after that", try.Result(err)+", "+fmt.Sprint(len(again)))
	_, err = unix.Openat(fd, "x", unix.O_CREAT|unix.O_CLOEXEC|unix.O_RDWR, 0o600)
	t.Say("create after that", try.Result(err))
	return nil
}

// An entry of a directory, and the position after it.
type entry struct {
	name string
	off  int64
}

func summary(entries []entry) string {
	var names []string
	for _, e := range entries {
		names = append(names, e.name)
	}
	slices.Sort(names)
	return fmt.Sprintf("%d entries, %d different, %s", len(names), len(slices.Compact(names)), try.Digest([]byte(strings.Join(names, "\n"))))
}

// list reads a directory from where it stands, calling each, if it is not nil,
// while it does.
func list(fd int, each func(name string) error) ([]entry, error) {
	var all []entry
	buf := make([]byte, 2048)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			return all, err
		}
		for rest := buf[:n]; len(rest) > 0; {
			d := (*unix.Dirent)(unsafe.Pointer(&rest[0]))
			raw := rest[unsafe.Offsetof(d.Name):d.Reclen]
			name := unix.ByteSliceToString(raw)
			rest = rest[d.Reclen:]
			if name == "." || name == ".." {
				continue
			}
			all = append(all, entry{name, d.Off})
			if each != nil {
				if err := each(name); err != nil {
					return all, fmt.Errorf("%s: %w", name, err)
				}
			}
		}
	}
}

func open(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(t.Path("dir"), 0o755), os.Symlink("file", t.Path("link"))); err != nil {
		return err
	}
	attempt := func(what, path string, flags int) {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			err = unix.Close(fd)
		}
		t.Say(what, try.Result(err))
	}
	attempt("EXCL of a file", path, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR)
	attempt("EXCL of a link", t.Path("link"), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR)
	attempt("NOFOLLOW of a link", t.Path("link"), unix.O_NOFOLLOW)
	attempt("PATH and NOFOLLOW of a link", t.Path("link"), unix.O_NOFOLLOW|unix.O_PATH)
	attempt("DIRECTORY of a file", path, unix.O_DIRECTORY)
	attempt("a directory to write", t.Path("dir"), unix.O_WRONLY)
	attempt("CREAT of a directory", t.Path("dir"), unix.O_CREAT|unix.O_RDONLY)
	attempt("file with a slash", path+"/", unix.O_RDONLY)
	attempt("CREAT with a slash", t.Path("new")+"/", unix.O_CREAT|unix.O_RDWR)
	attempt("below a file", path+"/x", unix.O_RDONLY)
	attempt("CREAT below nothing", t.Path("none/x"), unix.O_CREAT|unix.O_RDWR)
	attempt("NOATIME", path, unix.O_NOATIME)
	attempt("SYNC", path, unix.O_SYNC|unix.O_WRONLY)
	attempt("TRUNC read-only", path, unix.O_TRUNC)
	t.Say("size then", try.Size(path))
	fd, err := unix.Openat2(unix.AT_FDCWD, t.Path("dir"), &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // read-only
	_, err = unix.Openat2(fd, "../file", &unix.OpenHow{Flags: unix.O_RDONLY, Resolve: unix.RESOLVE_BENEATH})
	t.Say("BENEATH upwards", try.Result(err))
	_, _, err = unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	t.Say("name_to_handle_at", try.Result(err))
	return nil
}
