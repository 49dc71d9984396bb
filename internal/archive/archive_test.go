package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var plenty = Limits{Entries: 1000, Bytes: 1 << 20}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// tree lists what is below dir: mode, path, content or target.
func tree(t testing.TB, dir string) []string {
	t.Helper()
	var list []string
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		line := fmt.Sprintf("%v %s", info.Mode(), name)
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			must(t, err)
			line += " -> " + target
		case 0:
			body, err := os.ReadFile(path)
			must(t, err)
			line += fmt.Sprintf(" %q", body)
		}
		list = append(list, line)
		return nil
	}))
	return list
}

func TestRoundTrip(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(from, name) }
	must(t,
		os.MkdirAll(at("d/empty"), 0o755),
		os.WriteFile(at("d/file"), []byte("content"), 0o600),
		os.Link(at("d/file"), at("d/second name")),
		os.Symlink("../../anywhere", at("d/link")),
		os.Symlink("/absolute", at("d/other link")),
		os.WriteFile(at("d/\n\xff odd"), nil, 0o644),
		os.Chmod(at("d/file"), 0o4710),
		os.Chmod(at("d/empty"), 0o555|fs.ModeSticky),
	)
	when := time.Unix(1_000_000_000, 123_456_789)
	for _, name := range []string{"d/file", "d/empty", "d"} {
		must(t, os.Chtimes(at(name), when, when))
	}
	var buf bytes.Buffer
	must(t, Write(&buf, at("d")+"/", "as"))
	must(t, Extract(&buf, Target{Dir: to, Name: "new"}, plenty))
	want := tree(t, at("d"))
	for i := range want {
		want[i] = strings.Replace(want[i], "urwx--x---", "-rwx--x---", 1) // no longer set-user-ID
	}
	if got := tree(t, filepath.Join(to, "new")); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, name := range []string{"file", "empty", ""} {
		info, err := os.Stat(filepath.Join(to, "new", name))
		must(t, err)
		if !info.ModTime().Equal(when) {
			t.Errorf("%q was modified at %v, want %v", name, info.ModTime(), when)
		}
	}
	a, err := os.Stat(filepath.Join(to, "new/file"))
	must(t, err)
	if b, err := os.Stat(filepath.Join(to, "new/second name")); err != nil || !os.SameFile(a, b) {
		t.Errorf("the hard link is none: %v", err)
	}
}

// Directories have their modes and times whatever the order of the entries.
func TestDirectoriesAreSettledLast(t *testing.T) {
	to, when := t.TempDir(), time.Unix(1e9, 0)
	headers := []tar.Header{dir("d"), dir("d/a"), dir("d/b"), file("d/b/x", ""), file("d/a/x", "")}
	for i := range headers {
		headers[i].ModTime = when
		if strings.HasSuffix(headers[i].Name, "/") {
			headers[i].Mode = 0o555
		}
	}
	must(t, Extract(bytes.NewReader(archive(t, headers...)), Target{Dir: to, Name: "d"}, plenty))
	for _, name := range []string{"d", "d/a", "d/b"} {
		if info, err := os.Stat(filepath.Join(to, name)); err != nil || info.Mode().Perm() != 0o555 || !info.ModTime().Equal(when) {
			t.Errorf("%s: %v, modified at %v, %v", name, info.Mode(), info.ModTime(), err)
		}
	}
	must(t, os.Chmod(to+"/d", 0o755), os.Chmod(to+"/d/a", 0o755), os.Chmod(to+"/d/b", 0o755)) // for their removal
}

func TestContentsAlone(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(from+"/a", []byte("a"), 0o644), os.Mkdir(from+"/d", 0o755), os.WriteFile(from+"/d/b", []byte("b"), 0o644))
	var buf bytes.Buffer
	must(t, Write(&buf, from, "."))
	var names []string
	for tr := tar.NewReader(&buf); ; {
		h, err := tr.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	if want := []string{"a", "d/", "d/b"}; !slices.Equal(names, want) {
		t.Errorf("names %q, want %q", names, want)
	}
	// As an agent writes it: the directory first, whose contents go into one that is there.
	raw := archive(t, dir("src"), file("src/a", "new"), dir("src/d"), file("src/d/b", "b"))
	must(t, os.WriteFile(to+"/a", []byte("old"), 0o600), os.WriteFile(to+"/mine", nil, 0o600), os.Chmod(to, 0o751))
	must(t, Extract(bytes.NewReader(raw), Target{Dir: to, Name: ".", Want: Directory}, plenty))
	want := []string{`-rw-r----- a "new"`, "drwxr-x--- d", `-rw-r----- d/b "b"`, `-rw------- mine ""`}
	if got := tree(t, to); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if info, err := os.Stat(to); err != nil || info.Mode().Perm() != 0o751 {
		t.Errorf("the directory that was there has mode %v", info.Mode())
	}
}

func TestWriteRefusesSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/d", 0o755), unix.Mkfifo(dir+"/d/fifo", 0o600))
	err := Write(&bytes.Buffer{}, dir+"/d", "d")
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "d/fifo is a FIFO, which is not copied") {
		t.Errorf("got %v", err)
	}
	if err := Write(&bytes.Buffer{}, dir+"/none", "d"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of what is not there: %v", err)
	}
}

// Entries of tars, as an agent writes them or an attacker.
func entry(kind byte, name, target string) tar.Header {
	return tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o640, Uid: os.Geteuid(), Gid: os.Getegid(), Format: tar.FormatPAX}
}

func file(name, content string) tar.Header {
	h := entry(tar.TypeReg, name, "")
	h.Size, h.PAXRecords = int64(len(content)), map[string]string{"HUSK.content": content}
	return h
}

func dir(name string) tar.Header {
	h := entry(tar.TypeDir, name+"/", "")
	h.Mode = 0o750
	return h
}

func symlink(name, target string) tar.Header { return entry(tar.TypeSymlink, name, target) }
func link(name, target string) tar.Header    { return entry(tar.TypeLink, name, target) }

func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range headers {
		content := h.PAXRecords["HUSK.content"]
		h.PAXRecords = nil
		must(t, tw.WriteHeader(&h))
		_, err := tw.Write([]byte(content))
		must(t, err)
	}
	must(t, tw.Close())
	return buf.Bytes()
}

// What a hostile guest may send instead of the directory "data" or the file that was
// asked for. Beside the target lies a directory that none of it may reach, and in it what
// the host has put there.
func TestAttacks(t *testing.T) {
	for _, tt := range []struct {
		name   string
		tar    []tar.Header
		text   string
		target string // "data" where empty
	}{
		{name: "parent", tar: []tar.Header{dir("data"), file("data/../../out/x", "")}, text: "not a path within"},
		{name: "parent as the first", tar: []tar.Header{file("../out/x", "")}, text: "not a path within"},
		{name: "parent itself", tar: []tar.Header{dir("..")}, text: "not a path within"},
		{name: "absolute", tar: []tar.Header{dir("data"), file("/out/x", "")}, text: "not a path within"},
		{name: "empty element", tar: []tar.Header{dir("data"), file("data//x", "")}, text: "not a path within"},
		{name: "too long", tar: []tar.Header{dir("data"), file("data/"+strings.Repeat("x/", 4096)+"x", "")}, text: "not a path within"},
		{name: "a path as the first", tar: []tar.Header{file("out/x", "")}, text: "must be a name, not a path"},
		{name: "beside the first", tar: []tar.Header{dir("data"), file("out/x", "")}, text: `"out/x" is not in "data"`},
		{name: "beside, by a common prefix", tar: []tar.Header{dir("data"), file("data2", "")}, text: `"data2" is not in "data"`},
		{name: "after a file", tar: []tar.Header{file("data", ""), file("out", "")}, text: "after a first entry that is no directory"},
		{name: "after a link", tar: []tar.Header{symlink("data", "../out"), file("data/x", "")}, text: "after a first entry that is no directory"},
		{name: "through a link", tar: []tar.Header{dir("data"), symlink("data/l", "../../out"), file("data/l/x", "")}, text: `below "data/l", which is a symbolic link`},
		{name: "through an absolute link", tar: []tar.Header{dir("data"), symlink("data/l", "/OUT"), file("data/l/x", "")}, text: "which is a symbolic link"},
		{name: "through a link within", tar: []tar.Header{dir("data"), dir("data/d"), symlink("data/l", "d"), file("data/l/x", "")}, text: "which is a symbolic link"},
		{name: "through two links", tar: []tar.Header{dir("data"), symlink("data/a", "."), symlink("data/b", "a/../../out"), file("data/b/x", "")}, text: "which is a symbolic link"},
		{name: "directory through a link", tar: []tar.Header{dir("data"), symlink("data/l", "../../out"), dir("data/l/d")}, text: "which is a symbolic link"},
		{name: "directory over a link", tar: []tar.Header{dir("data"), symlink("data/l", "../../out"), dir("data/l")}, text: "exists and is a symbolic link, not a directory"},
		{name: "link over a directory", tar: []tar.Header{dir("data"), dir("data/d"), file("data/d/f", ""), symlink("data/d", "../../out"), file("data/d/x", "")}, text: "data/d exists and is a directory"},
		{name: "through a link of the host's", tar: []tar.Header{dir("data"), file("data/l/x", "")}, target: "mine", text: `below "mine/l", which is a symbolic link`},
		{name: "over the host's link", tar: []tar.Header{dir("data"), dir("data/l")}, target: "mine", text: "exists and is a symbolic link, not a directory"},
		{name: "hard link out", tar: []tar.Header{dir("data"), link("data/l", "../out/secret")}, text: "not a path within"},
		{name: "absolute hard link", tar: []tar.Header{dir("data"), link("data/l", "/etc/passwd")}, text: "not a path within"},
		{name: "hard link beside", tar: []tar.Header{dir("data"), link("data/l", "secret")}, text: `"secret" is not in "data"`},
		{name: "hard link by a link", tar: []tar.Header{dir("data"), symlink("data/d", "../../out"), link("data/l", "data/d/secret")}, text: "which is a symbolic link"},
		{name: "hard link to a link", tar: []tar.Header{dir("data"), symlink("data/s", "../../out/secret"), link("data/l", "data/s"), file("data/l", "x")}, text: "which is a symbolic link"},
		{name: "hard link to a directory", tar: []tar.Header{dir("data"), link("data/l", "data")}, text: "which is a directory"},
		{name: "hard link to itself", tar: []tar.Header{dir("data"), file("data/l", ""), link("data/l", "data/l")}, text: "hard link"},
		{name: "hard link alone", tar: []tar.Header{link("data", "secret")}, text: "the only entry"},
		{name: "character device", tar: []tar.Header{dir("data"), entry(tar.TypeChar, "data/null", "")}, text: "character device"},
		{name: "block device", tar: []tar.Header{dir("data"), entry(tar.TypeBlock, "data/sda", "")}, text: "block device"},
		{name: "FIFO", tar: []tar.Header{dir("data"), entry(tar.TypeFifo, "data/f", "")}, text: "FIFO"},
		{name: "missing directory", tar: []tar.Header{dir("data"), file("data/d/x", "")}, text: `"data/d" has not come before it`},
		{name: "many entries", tar: slices.Repeat([]tar.Header{dir("data")}, plenty.Entries+1), text: "more than 1000 entries"},
		{name: "many bytes", tar: []tar.Header{dir("data"), file("data/a", strings.Repeat("x", 1<<19)), file("data/b", strings.Repeat("x", 1<<19+1))}, text: "more than 1048576 bytes"},
		{name: "nothing", text: "is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			top := t.TempDir()
			must(t,
				os.MkdirAll(top+"/target/mine", 0o755), os.Mkdir(top+"/out", 0o755),
				os.WriteFile(top+"/out/secret", []byte("secret"), 0o600), os.WriteFile(top+"/target/secret", []byte("secret"), 0o600),
				os.Symlink("../../out", top+"/target/mine/l"),
			)
			for i := range tt.tar {
				tt.tar[i].Linkname = strings.ReplaceAll(tt.tar[i].Linkname, "/OUT", top+"/out")
			}
			before := outside(t, top)
			target := Target{Dir: top + "/target", Name: "data"}
			if tt.target != "" {
				target.Name = tt.target
			}
			err := Extract(bytes.NewReader(archive(t, tt.tar...)), target, plenty)
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
			if after := outside(t, top); !slices.Equal(after, before) {
				t.Errorf("outside there is\n%q, before it was\n%q", after, before)
			}
		})
	}
}

// outside is what lies below top, but for the target and what of the host's may be added
// to.
func outside(t testing.TB, top string) []string {
	return slices.DeleteFunc(tree(t, top), func(line string) bool { return strings.Contains(line, " target/data") })
}

// A file is never written through what was in its place.
func TestFilesAreReplaced(t *testing.T) {
	top := t.TempDir()
	must(t, os.Mkdir(top+"/d", 0o755), os.WriteFile(top+"/kept", []byte("kept"), 0o600), os.Link(top+"/kept", top+"/d/hard"), os.Symlink("../kept", top+"/d/soft"))
	raw := archive(t, dir("x"), file("x/hard", "new"), file("x/soft", "new"))
	must(t, Extract(bytes.NewReader(raw), Target{Dir: top, Name: "d"}, plenty))
	want := []string{"drwxr-xr-x d", `-rw-r----- d/hard "new"`, `-rw-r----- d/soft "new"`, `-rw------- kept "kept"`}
	if got := tree(t, top); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWant(t *testing.T) {
	for _, tt := range []struct {
		want  Want
		first tar.Header
		text  string
	}{
		{Directory, file("x", ""), "does not exist as one"},
		{NoDirectory, dir("x"), "which is none"},
		{Directory, dir("x"), ""},
		{NoDirectory, symlink("x", "y"), ""},
	} {
		err := Extract(bytes.NewReader(archive(t, tt.first)), Target{Dir: t.TempDir(), Name: "n", Want: tt.want}, plenty)
		if (err == nil) != (tt.text == "") || err != nil && !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%v, first %s: %v, want %q", tt.want, tt.first.Name, err, tt.text)
		}
	}
}

// A few bytes must not become many, nor a broken tar a file.
func TestSparseAndBroken(t *testing.T) {
	raw := archive(t, dir("data"))
	raw = raw[:len(raw)-2*512]
	old := make([]byte, 512) // an old GNU header of a sparse file of 8 EiB
	copy(old, "data/huge")
	copy(old[100:], "0000644\x00")
	copy(old[124:], "00000000000\x00")
	copy(old[148:], "        ")
	old[156] = 'S'
	copy(old[257:], "ustar  \x00")
	old[483] = 0x80 // the real size, in base 256
	copy(old[484:495], []byte{0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	sum := 0
	for _, b := range old {
		sum += int(b)
	}
	copy(old[148:], fmt.Sprintf("%06o\x00 ", sum))
	to := t.TempDir()
	err := Extract(bytes.NewReader(append(raw, old...)), Target{Dir: to, Name: "data"}, Limits{Entries: 10, Bytes: math.MaxInt64})
	if err == nil || !strings.Contains(err.Error(), "it has holes") {
		t.Errorf("a sparse file of 8 EiB: %v", err)
	}
	cut := archive(t, dir("data"), file("data/f", strings.Repeat("x", 10_000)))
	err = Extract(bytes.NewReader(cut[:len(cut)-8000]), Target{Dir: to, Name: "cut"}, plenty)
	if err == nil {
		t.Error("a tar that was cut was extracted")
	}
	if _, err := os.Lstat(to + "/cut/f"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a part of a file was left: %v", err)
	}
}

// Whatever the tar, nothing but the target changes.
func FuzzExtract(f *testing.F) {
	for _, headers := range [][]tar.Header{
		{dir("data"), file("data/a", "x"), symlink("data/l", "../../out"), link("data/h", "data/a")},
		{file("data", "content")},
		{dir("data"), symlink("data/l", "/"), file("data/l/tmp/x", "x")},
	} {
		f.Add(archive(f, headers...))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		top := t.TempDir()
		must(t, os.Mkdir(top+"/target", 0o755), os.Mkdir(top+"/out", 0o755), os.WriteFile(top+"/target/other", nil, 0o600))
		Extract(bytes.NewReader(raw), Target{Dir: top + "/target", Name: "data"}, plenty) //nolint:errcheck // any answer will do
		want := []string{"drwxr-xr-x out", "drwxr-xr-x target", `-rw------- target/other ""`}
		if got := outside(t, top); !slices.Equal(got, want) {
			t.Errorf("outside there is %q", got)
		}
	})
}
