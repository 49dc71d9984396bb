package initrd

import (
	"bytes"
	"flag"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func sample() []Entry {
	return []Entry{
		File("init", 0o755, []byte("#!/bin/sh\n")),
		Symlink("bin/sh", "busybox"),
		CharDevice("dev/console", 0o600, 5, 1),
		CharDevice("dev/null", 0o666, 1, 3),
		Dir("tmp", 0o777|fs.ModeSticky),
		File("lib/modules/load", 0o644, nil),
		File("lib/modules.x", 0o644, []byte("abcd")),
		Dir("root", 0o700),
	}
}

func archive(t *testing.T, entries []Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, entries...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWriteGolden(t *testing.T) {
	got := archive(t, sample())
	golden := filepath.Join("testdata", "sample.cpio")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("archive differs from %s:\n%q", golden, got)
	}
}

func TestWriteIgnoresOrder(t *testing.T) {
	entries := sample()
	want := archive(t, entries)
	slices.Reverse(entries)
	if !bytes.Equal(archive(t, entries), want) {
		t.Error("the same entries in another order give another archive")
	}
}

// TestWriteReadsBack reads an archive by another implementation, which leaves out
// device numbers: the golden file has those.
func TestWriteReadsBack(t *testing.T) {
	type header struct {
		Name, Link string
		Mode       cpio.FileMode
		Inode      int64
		Data       string
	}
	want := []header{
		{Name: "bin", Mode: cpio.TypeDir | 0o755},
		{Name: "bin/sh", Mode: cpio.TypeSymlink | 0o777, Link: "busybox"},
		{Name: "dev", Mode: cpio.TypeDir | 0o755},
		{Name: "dev/console", Mode: cpio.TypeChar | 0o600},
		{Name: "dev/null", Mode: cpio.TypeChar | 0o666},
		{Name: "init", Mode: cpio.TypeReg | 0o755, Data: "#!/bin/sh\n"},
		{Name: "lib", Mode: cpio.TypeDir | 0o755},
		{Name: "lib/modules", Mode: cpio.TypeDir | 0o755},
		{Name: "lib/modules.x", Mode: cpio.TypeReg | 0o644, Data: "abcd"},
		{Name: "lib/modules/load", Mode: cpio.TypeReg | 0o644},
		{Name: "root", Mode: cpio.TypeDir | 0o700},
		{Name: "tmp", Mode: cpio.TypeDir | cpio.ModeSticky | 0o777},
	}
	for i := range want {
		want[i].Inode = int64(i) + 1
	}

	var got []header
	r := cpio.NewReader(bytes.NewReader(archive(t, sample())))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Guid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: uid %d, gid %d, modified %v; want root and the epoch", h.Name, h.Uid, h.Guid, h.ModTime)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, header{Name: h.Name, Link: h.Linkname, Mode: h.Mode, Inode: h.Inode, Data: string(data)})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestWriteRejects(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []Entry
		want    string
	}{
		{"absolute path", []Entry{File("/init", 0o755, nil)}, "not relative and clean"},
		{"path with ..", []Entry{File("a/../init", 0o755, nil)}, "not relative and clean"},
		{"root", []Entry{Dir(".", 0o755)}, "not relative and clean"},
		{"trailer", []Entry{File("TRAILER!!!", 0o755, nil)}, "end mark"},
		{"zero byte", []Entry{File("in\x00it", 0o755, nil)}, "zero byte"},
		{"long path", []Entry{File(strings.Repeat("a/", 2048)+"b", 0o755, nil)}, "longer than 4095 bytes"},
		{"long link", []Entry{Symlink("a", strings.Repeat("x", 4096))}, "longer than 4095 bytes"},
		{"empty link", []Entry{Symlink("a", "")}, "empty"},
		{"twice", []Entry{File("a", 0o644, nil), Dir("a", 0o755)}, "there already"},
		{"below a file", []Entry{File("a/b", 0o644, nil), File("a", 0o644, nil)}, `"a" is not a directory`},
		{"below a link", []Entry{File("a/b/c", 0o644, nil), Symlink("a", "x")}, `"a" is not a directory`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Write(io.Discard, tt.entries...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Write = %v, want an error with %q", err, tt.want)
			}
		})
	}
}
