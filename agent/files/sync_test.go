package files

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/files"
)

// version is what the kubelet's atomic writer leaves: keys, each with the version as
// its content.
func version(v string, keys ...string) []*tar.Header {
	all := []*tar.Header{dirEntry("."), dirEntry(".." + v)}
	for _, key := range keys {
		all = append(all, fileEntry(".."+v+"/"+key, v))
	}
	all = append(all, linkEntry("..data", ".."+v))
	for _, key := range keys {
		all = append(all, linkEntry(key, "..data/"+key))
	}
	return all
}

func TestSyncMakesAndUnmakes(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		secret := with(fileEntry("d/secret", "s3cret"), func(h *tar.Header) { h.Mode = 0o4400 })
		mode, shown := int64(0o2750), "dgrwxr-x---"
		if os.Getuid() == 0 { // whom nothing hinders
			secret.Uid, secret.Gid = 12, 345
			mode, shown = 0o2550, "dgr-xr-x---"
		}
		g.mustSync("deep/tree", dirEntry("."), with(dirEntry("d/"), func(h *tar.Header) { h.Mode = mode }), secret,
			fileEntry("empty", ""), linkEntry("l", "/nowhere"), fileEntry("name\n\xff\"", "x"))
		want := "drwxr-xr-x . \n" + shown + " d \nur-------- d/secret s3cret\n-rw-r--r-- empty \nLrwxrwxrwx l /nowhere\n-rw-r--r-- name\n\xff\" x\n"
		if got := listing(t, g.path("deep/tree")); got != want {
			t.Errorf("got\n%q, want\n%q", got, want)
		}
		for _, name := range []string{".", "d", "d/secret", "empty", "l"} {
			st := g.lstat("deep/tree/" + name)
			if st.Mtim.Nano() != when.UnixNano() {
				t.Errorf("%s is of %d", name, st.Mtim.Nano())
			}
			if name == "d/secret" && (int(st.Uid) != secret.Uid || int(st.Gid) != secret.Gid) {
				t.Errorf("%s is %d:%d's", name, st.Uid, st.Gid)
			}
		}
		if st := g.lstat("deep"); st.Mode&0o7777 != dirMode {
			t.Errorf("the directory of copies has mode %#o", st.Mode)
		}

		// A thing of each kind becomes one of another.
		g.mustSync("deep/tree", dirEntry("."), fileEntry("d", "file"), dirEntry("empty"), fileEntry("empty/x", "y"), dirEntry("l"))
		want = "drwxr-xr-x . \n-rw-r--r-- d file\ndrwxr-xr-x empty \n-rw-r--r-- empty/x y\ndrwxr-xr-x l \n"
		if got := listing(t, g.path("deep/tree")); got != want {
			t.Errorf("got\n%s, want\n%s", got, want)
		}
		if st := g.lstat("deep/tree"); st.Mtim.Nano() != when.UnixNano() {
			t.Errorf("the target is of %d", st.Mtim.Nano())
		}

		for range 2 { // the second finds nothing
			if err := g.do(func(conn net.Conn) error { return files.Drop(g.ctx, conn, g.path("deep/tree")) }); err != nil {
				t.Fatal(err)
			}
			if entries, err := os.ReadDir(g.dir); len(entries) != 1 || entries[0].Name() != stageDir || err != nil {
				t.Errorf("left: %v, %v", entries, err)
			}
		}
		if entries, err := os.ReadDir(g.path(stageDir)); len(entries) != 0 || err != nil {
			t.Errorf("left in the stage: %v, %v", entries, err)
		}
	})
}

func TestSyncDoesNotTouchWhatIsUnchanged(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	large := strings.Repeat("0123456789abcdef", 20000)
	entries := []*tar.Header{
		dirEntry("."), dirEntry("d"), fileEntry("d/same", large), fileEntry("d/early", large), fileEntry("late", large),
		fileEntry("longer", "x"), linkEntry("l", "d/same"), fileEntry("gone", ""), dirEntry("gone.d"), fileEntry("gone.d/x", ""),
	}
	g.mustSync("t", entries...)
	// What a runtime or container puts there is not the sync's.
	if err := os.Mkdir(g.path("t/mountpoint"), 0o700); err != nil {
		t.Fatal(err)
	}
	before := map[string]unix.Stat_t{}
	for _, name := range []string{"", "d", "d/same", "d/early", "late", "longer", "l"} {
		before[name] = g.lstat("t/" + name)
	}
	g.mustSync("t", entries...)
	for name, st := range before {
		if now := g.lstat("t/" + name); now.Ino != st.Ino || now.Ctim != st.Ctim && name != "" {
			t.Errorf("%q was touched", name)
		}
	}
	early, late := "x"+large[1:], large[:len(large)-1]+"x"
	g.mustSync("t", dirEntry("."), dirEntry("d"), with(fileEntry("d/same", large), func(h *tar.Header) { h.Mode = 0o600 }),
		fileEntry("d/early", early), fileEntry("late", late), fileEntry("longer", "xy"), linkEntry("l", "d/same"))
	for name, st := range before {
		changed := name == "d/early" || name == "late" || name == "longer"
		if now := g.lstat("t/" + name); changed == (now.Ino == st.Ino) {
			t.Errorf("%q: changed %t, inode %d before, %d now", name, changed, st.Ino, now.Ino)
		}
	}
	for name, want := range map[string]string{"d/same": large, "d/early": early, "late": late, "longer": "xy"} {
		if b, err := os.ReadFile(g.path("t/" + name)); string(b) != want || err != nil {
			t.Errorf("%s is wrong: %d bytes, %v", name, len(b), err)
		}
	}
	if st := g.lstat("t/d/same"); st.Mode&0o7777 != 0o600 {
		t.Errorf("mode %#o", st.Mode)
	}
	names, err := os.ReadDir(g.path("t"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range names {
		got = append(got, n.Name())
	}
	if want := []string{"d", "l", "late", "longer", "mountpoint"}; !slices.Equal(got, want) {
		t.Errorf("there are %q, want %q", got, want)
	}
}

func TestSingleFileKeepsItsInode(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		g.mustSync("f", fileEntry(".", "127.0.0.1 localhost\n"))
		inode := g.lstat("f").Ino
		for _, content := range []string{"short", strings.Repeat("long", 50000), "", "127.0.0.1 a\n"} {
			g.mustSync("f", with(fileEntry(".", content), func(h *tar.Header) { h.Mode = 0o600 }))
			b, err := os.ReadFile(g.path("f"))
			if st := g.lstat("f"); string(b) != content || err != nil || st.Ino != inode || st.Mode&0o777 != 0o600 || st.Mtim.Nano() != when.UnixNano() {
				t.Errorf("%d bytes became %d, %v; inode %d, was %d; mode %#o", len(content), len(b), err, st.Ino, inode, st.Mode)
			}
		}
		read := func(most int) string {
			var got []byte
			if err := g.do(func(conn net.Conn) (err error) {
				got, err = files.Read(g.ctx, conn, g.path("f"), most)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return string(got)
		}
		if got := read(files.MaxRead) + "|" + read(3) + "|" + read(12); got != "127.0.0.1 a\n| a\n|127.0.0.1 a\n" {
			t.Errorf("read %q", got)
		}
		if err := g.sync("f", dirEntry(".")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a file becomes a directory: %v", err)
		}
		g.mustSync("d", dirEntry("."))
		if err := g.sync("d", fileEntry(".", "")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a directory becomes a file: %v", err)
		}
		for name, is := range map[string]func(error) bool{"none": errdefs.IsNotFound, "d": errdefs.IsFailedPrecondition, "f/x": errdefs.IsFailedPrecondition} {
			err := g.do(func(conn net.Conn) error {
				_, err := files.Read(g.ctx, conn, g.path(name), 1)
				return err
			})
			if !is(err) {
				t.Errorf("read %s: %v", name, err)
			}
		}
	})
}

// A reader opens the current version, and finds it whole and of one version,
// whatever is synced meanwhile.
func TestSwapIsAtomic(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	keys := []string{"a", "b", "c"}
	g.mustSync("v", version("0", keys...)...)
	stop := make(chan struct{})
	read := make(chan int)
	go func() {
		n := 0
		defer func() { read <- n }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			dir, err := os.OpenRoot(g.path("v/..data"))
			if errors.Is(err, os.ErrNotExist) { // removed after the symlink was read, which there must be
				_, err = os.Lstat(g.path("v/..data"))
				if err == nil {
					continue
				}
			}
			if err != nil {
				t.Errorf("there is no version: %v", err)
				return
			}
			first := ""
			for _, key := range keys {
				b, err := dir.ReadFile(key)
				if errors.Is(err, os.ErrNotExist) {
					break // the version that was current is being removed
				}
				if len(b) == 0 || first != "" && string(b) != first {
					t.Errorf("%s of version %s is %q, %v", key, first, b, err)
				}
				first = string(b)
				n++
			}
			dir.Close()
			if b, err := os.ReadFile(g.path("v/b")); err != nil && !errors.Is(err, os.ErrNotExist) || err == nil && len(b) == 0 {
				t.Errorf("b is %q, %v", b, err)
			}
		}
	}()
	for i := range 300 {
		g.mustSync("v", version(fmt.Sprint(i%7), keys...)...)
	}
	close(stop)
	if n := <-read; n == 0 {
		t.Error("nothing was read")
	}
}

// What a watcher of the directory is told, as far as it is told under runc.
func TestWatchersOfTheDirectory(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	g.mustSync("v", version("1", "a", "b")...)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, g.path("v"), unix.IN_ALL_EVENTS&^(unix.IN_ACCESS|unix.IN_OPEN|unix.IN_CLOSE)); err != nil {
		t.Fatal(err)
	}
	g.mustSync("v", version("2", "b", "c")...)
	var got []string
	buf := make([]byte, 1<<16)
	n, err := unix.Read(fd, buf)
	if err != nil {
		t.Fatal(err)
	}
	for b := buf[:n]; len(b) > 0; {
		mask, size := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
		name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size]), "\x00")
		b = b[unix.SizeofInotifyEvent+size:]
		for bit, is := range map[uint32]string{unix.IN_MOVED_TO: "to", unix.IN_DELETE: "delete", unix.IN_ATTRIB: "attrib"} {
			if mask&bit != 0 {
				got = append(got, is+" "+name)
				mask &^= bit | unix.IN_ISDIR
			}
		}
		if mask != 0 {
			t.Errorf("%q: event %#x", name, mask)
		}
	}
	want := []string{"to ..2", "to ..data", "to c", "delete ..1", "delete a", "attrib "}
	if !slices.Equal(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
}

func TestSyncBrokenOffChangesNothing(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		g.mustSync("v", version("1", "a")...)
		before := listing(t, g.path("v"))
		var whole bytes.Buffer
		if err := archiveOf(&whole, version("2", "a", "b")...); err != nil {
			t.Fatal(err)
		}
		why := errors.New("the source is gone")
		for _, size := range []int{0, 1, 512, 2000, whole.Len() - 1, whole.Len()} {
			err := g.do(func(conn net.Conn) error {
				return files.Sync(g.ctx, conn, g.path("v"), func(w io.Writer) error {
					w.Write(whole.Bytes()[:size])
					return why
				})
			})
			if !errors.Is(err, why) {
				t.Errorf("after %d bytes: %v", size, err)
			}
		}
		// The next one has its turn after those have ended.
		g.mustSync("v", version("1", "a")...)
		if got := listing(t, g.path("v")); got != before {
			t.Errorf("got\n%s, want\n%s", got, before)
		}
	})
}

func TestSyncRefuses(t *testing.T) {
	many := strings.Repeat("d/", 3000)
	for name, entries := range map[string][]*tar.Header{
		"nothing":               {},
		"no target":             {fileEntry("x", "")},
		"symlink as the target": {linkEntry(".", "/")},
		"up":                    {dirEntry("."), fileEntry("../x", "x")},
		"up and down":           {dirEntry("."), dirEntry("d"), fileEntry("d/../../x", "x")},
		"absolute":              {dirEntry("."), fileEntry("/x", "x")},
		"twice":                 {dirEntry("."), fileEntry("x", "x"), fileEntry("x", "y")},
		"the target twice":      {dirEntry("."), dirEntry(".")},
		"without its directory": {dirEntry("."), fileEntry("d/x", "x")},
		"below a file":          {dirEntry("."), fileEntry("d", ""), fileEntry("d/x", "x")},
		"below the file":        {fileEntry(".", ""), fileEntry("x", "x")},
		"through a symlink":     {dirEntry("."), linkEntry("d", ".."), fileEntry("d/x", "x")},
		"unclean":               {dirEntry("."), fileEntry("./x", "x")},
		"device":                {dirEntry("."), entryOf(tar.TypeChar, "null", 0o666)},
		"fifo":                  {dirEntry("."), entryOf(tar.TypeFifo, "f", 0o666)},
		"hard link":             {dirEntry("."), fileEntry("x", ""), hardEntry("y", "x")},
		"hard link to outside":  {dirEntry("."), hardEntry("y", "/etc/passwd")},
		"long name":             {dirEntry("."), fileEntry(strings.Repeat("x", 256), "")},
		"deep nest":             {dirEntry("."), fileEntry(many+"x", "")},
		"owner":                 {with(dirEntry("."), func(h *tar.Header) { h.Uid = 1<<32 - 1 })},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, newPipes(t), 1)
			g.mustSync("v", version("1", "a")...)
			g.mustSync("other", dirEntry("."), fileEntry("x", "other's"))
			before := listing(t, filepath.Dir(g.dir))
			for _, target := range []string{"v", "fresh"} {
				err := g.sync(target, entries...)
				if kind := target == "v" && name == "below the file"; !errdefs.IsInvalidArgument(err) && !(kind && errdefs.IsFailedPrecondition(err)) {
					t.Errorf("%s: %v", target, err)
				}
			}
			if got := listing(t, filepath.Dir(g.dir)); got != before {
				t.Errorf("got\n%s, want\n%s", got, before)
			}
		})
	}
	g := newGuest(t, newPipes(t), 1)
	for _, target := range []string{"/etc/x", filepath.Dir(g.dir), g.dir, g.path(stageDir + "/x")} {
		err := g.do(func(conn net.Conn) error {
			return files.Sync(g.ctx, conn, target, func(w io.Writer) error { return archiveOf(w, dirEntry(".")) })
		})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("target %s: %v", target, err)
		}
	}
}

// A container that may write its copy does not lead the next sync astray.
func TestSyncDoesNotFollowWhatAContainerHasLaid(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	outside := t.TempDir()
	entries := []*tar.Header{dirEntry("."), dirEntry("d"), dirEntry("d/e"), fileEntry("d/e/f", "x"), fileEntry("f", "x"), fileEntry("old", "x")}
	g.mustSync("t", entries...)
	want := listing(t, g.path("t"))
	for _, name := range []string{"d/e/f", "d/e", "d", "f", "old"} {
		os.RemoveAll(g.path("t/" + name))
		if err := os.Symlink(outside, g.path("t/"+name)); err != nil {
			t.Fatal(err)
		}
		g.mustSync("t", entries...)
		if got := listing(t, g.path("t")); got != want {
			t.Errorf("%s: got\n%s, want\n%s", name, got, want)
		}
	}
	os.RemoveAll(g.path("t/d"))
	os.MkdirAll(filepath.Join(outside, "e"), 0o755)
	os.WriteFile(filepath.Join(outside, "e/f"), []byte("kept"), 0o644)
	os.Symlink(outside, g.path("t/d"))
	g.mustSync("t", dirEntry("."))
	if b, err := os.ReadFile(filepath.Join(outside, "e/f")); string(b) != "kept" || err != nil {
		t.Errorf("outside: %q, %v", b, err)
	}
}

func TestNoMemoryForACopy(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts a small tmpfs: needs root")
	}
	over(t, func(t *testing.T, g *guest) {
		if err := os.Mkdir(g.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", g.dir, "tmpfs", 0, "size=1m,nr_inodes=100"); err != nil {
			t.Skipf("mount: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(g.dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		g.mustSync("v", version("1", "a")...)
		g.mustSync("f", fileEntry(".", "small"))
		before := listing(t, g.path("v")) + listing(t, g.path("f"))
		many := []*tar.Header{dirEntry(".")}
		for i := range 200 {
			many = append(many, fileEntry(fmt.Sprint(i), ""))
		}
		large := strings.Repeat("x", 2<<20)
		for name, entries := range map[string][]*tar.Header{
			"v": append(version("2", "a"), fileEntry("large", large)), "f": {fileEntry(".", large)}, "many": many,
		} {
			err := g.sync(name, entries...)
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "memory") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got := listing(t, g.path("v")) + listing(t, g.path("f")); got != before {
			t.Errorf("got\n%s, want\n%s", got, before)
		}
		g.mustSync("v", version("2", "a")...) // there is room again
	})
}
