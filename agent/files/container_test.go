package files

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/files"
)

// rootEnv has this program become a container's first process, whose root is that
// directory.
const rootEnv = "HUSK_TEST_ROOT"

func TestMain(m *testing.M) {
	if root := os.Getenv(rootEnv); root != "" {
		err := mountsIn(root)
		if err == nil {
			err = syscall.Chroot(root)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
		return
	}
	slog.SetLogLoggerLevel(slog.LevelError)
	os.Exit(m.Run())
}

// mountsIn mounts what a container has: a tmpfs on /mnt, if it is there, and on
// /etc/hosts a file of its own, which is /mounted.
func mountsIn(root string) error {
	err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if _, missing := os.Stat(root + "/mnt"); err == nil && missing == nil {
		err = errors.Join(
			unix.Mount("none", root+"/mnt", "tmpfs", 0, "size=1m"),
			unix.Mount(root+"/mounted", root+"/etc/hosts", "", unix.MS_BIND, ""),
		)
	}
	return err
}

// newContainer starts a process whose root is dir, in a mount namespace of its own,
// and which ends with the test.
func newContainer(t *testing.T, g *guest, id, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("changes a process's root: needs root")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = []string{rootEnv + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cancel()
		cmd.Wait()
	})
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "ready\n" {
		t.Fatalf("the container says %q, %v", said, err)
	}
	g.pids[id] = cmd.Process.Pid
}

// get returns the entries of an archive: type, name, where it leads or its content.
func (g *guest) get(container, path string) (entries []string, raw []byte, err error) {
	var b bytes.Buffer
	err = g.do(func(conn net.Conn) error { return files.Get(g.ctx, conn, container, path, &b) })
	if err != nil {
		return nil, nil, err
	}
	raw = slices.Clone(b.Bytes())
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entries, raw, nil
		}
		if err != nil {
			return nil, nil, err
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return nil, nil, err
		}
		entries = append(entries, fmt.Sprintf("%c %s %s%s", h.Typeflag, h.Name, h.Linkname, content))
	}
}

func TestPutAndGetBack(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		dir := t.TempDir()
		entries := []*tar.Header{
			with(dirEntry("./"), func(h *tar.Header) { h.Mode = 0o700 }), // is the container's
			with(dirEntry("top/"), func(h *tar.Header) { h.Mode = 0o1770 }),
			with(fileEntry("top/suid", "run me"), func(h *tar.Header) { h.Mode = 0o6755 }),
			hardEntry("top/again", "top/suid"),
			linkEntry("top/abs", "/etc/hostname"),
			linkEntry("top/up", "../../.."),
			entryOf(tar.TypeFifo, "top/fifo", 0o620),
			fileEntry("top/name\n\xff", "odd"),
			fileEntry("not/there/before", "x"),
		}
		if os.Getuid() == 0 {
			entries = append(entries, with(entryOf(tar.TypeChar, "top/null", 0o606), func(h *tar.Header) {
				h.Devmajor, h.Devminor, h.Uid, h.Gid = 1, 3, 7, 8
			}))
		}
		xattr := with(fileEntry("top/xattr", "x"), func(h *tar.Header) { h.PAXRecords[files.XattrPrefix+"user.husk"] = "a\x00b=\n" })
		hasXattr := unix.Setxattr(dir, "user.try", nil, 0) == nil
		if hasXattr {
			entries = append(entries, xattr)
		}
		for range 2 { // over nothing, and over what is there
			if err := g.put("c", dir, entries...); err != nil {
				t.Fatal(err)
			}
		}
		modes := map[string]uint32{"": 0o755, "top": 0o1770, "top/suid": 0o6755, "top/again": 0o6755, "top/fifo": 0o620, "not": 0o755}
		if os.Getuid() == 0 {
			modes["top/null"] = 0o606
		}
		for name, mode := range modes {
			var st unix.Stat_t
			if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil || st.Mode&0o7777 != mode {
				t.Errorf("%s: %v, mode %#o, want %#o", name, err, st.Mode, mode)
			}
			if strings.HasPrefix(name, "top") && st.Mtim.Nano() != when.UnixNano() {
				t.Errorf("%s is of %d", name, st.Mtim.Nano())
			}
			if name == "top/null" && (st.Rdev != unix.Mkdev(1, 3) || st.Uid != 7 || st.Gid != 8) {
				t.Errorf("%s: %+v", name, st)
			}
		}

		got, raw, err := g.get("c", dir+"/top")
		if err != nil {
			t.Fatal(err)
		}
		if got[0] != "5 top/ " {
			t.Errorf("the first entry is %q", got[0])
		}
		slices.Sort(got)
		first, second := "again", "suid" // whichever the directory lists first is the file
		if slices.Contains(got, "0 top/suid run me") {
			first, second = second, first
		}
		want := []string{
			"0 top/" + first + " run me", "0 top/name\n\xff odd", "1 top/" + second + " top/" + first,
			"2 top/abs /etc/hostname", "2 top/up ../../..", "5 top/ ", "6 top/fifo ",
		}
		if os.Getuid() == 0 {
			want = append(want, "3 top/null ")
		}
		if hasXattr {
			want = append(want, "0 top/xattr x")
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if hasXattr && !strings.Contains(string(raw), files.XattrPrefix+"user.husk=a\x00b=\n") {
			t.Error("the extended attribute is not in the archive")
		}
		// What was got can be put.
		again := t.TempDir()
		if err := g.do(func(conn net.Conn) error { return files.Put(g.ctx, conn, "c", again, bytes.NewReader(raw)) }); err != nil {
			t.Fatal(err)
		}
		if a, b := listing(t, dir+"/top"), listing(t, again+"/top"); a != b {
			t.Errorf("put again:\n%s, want\n%s", b, a)
		}
	})
}

func TestGetOfOneThing(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	dir := t.TempDir()
	for name, content := range map[string]string{"file": "content", "d/x": "y"} {
		os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	os.Symlink("d", dir+"/link")
	ln, err := net.Listen("unix", dir+"/d/socket") // no archive holds one
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for path, want := range map[string][]string{
		"/file":     {"0 file content"},
		"/link":     {"2 link d"},
		"/link/":    {"5 link/ ", "0 link/x y"},
		"/link/x":   {"0 x y"},
		"/d/../d/.": {"5 d/ ", "0 d/x y"},
	} {
		if got, _, err := g.get("c", dir+path); !slices.Equal(got, want) || err != nil {
			t.Errorf("%s: %q, %v, want %q", path, got, err, want)
		}
	}
	if got, _, err := g.get("c", "/proc"); !slices.Equal(got, []string{"5 proc/ "}) || err != nil {
		t.Errorf("/proc: %d entries, %v", len(got), err)
	}
}

func TestErrorsOfContainers(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		dir := t.TempDir()
		os.WriteFile(dir+"/file", nil, 0o644)
		os.Symlink("loop", dir+"/loop")
		large := fileEntry("large", strings.Repeat("x", 4<<20)) // the guest answers before its end
		g.pids["ended"] = 1 << 30
		for _, c := range []struct {
			container, path string
			is              func(error) bool
		}{
			{"none", dir, errdefs.IsNotFound},
			{"created", dir, errdefs.IsFailedPrecondition},
			{"ended", dir, errdefs.IsFailedPrecondition},
			{"c", dir + "/none/x", errdefs.IsNotFound},
			{"c", dir + "/file/x", errdefs.IsFailedPrecondition},
			{"c", dir + "/loop/x", errdefs.IsInvalidArgument},
			{"c", "/proc/self/root/etc/x", errdefs.IsInvalidArgument},
			{"c", "relative", errdefs.IsInvalidArgument},
			{"../c", dir, errdefs.IsInvalidArgument},
		} {
			if err := g.put(c.container, c.path, large); !c.is(err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("put %s %s: %v", c.container, c.path, err)
			}
			if _, _, err := g.get(c.container, c.path); !c.is(err) {
				t.Errorf("get %s %s: %v", c.container, c.path, err)
			}
		}
		if err := g.put("c", dir+"/file", large); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("put into a file: %v", err)
		}
	})
}

// The paths of a container are its own: absolute symlinks stay in its root, on the
// way to the directory; below that none leads out.
func TestPutStaysInTheContainer(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	root, outside := t.TempDir(), t.TempDir()
	for _, dir := range []string{"real", "in/sub", "etc"} {
		os.MkdirAll(filepath.Join(root, dir), 0o755)
	}
	os.Symlink("/real", root+"/abs")
	os.Symlink("../../../../real", root+"/up")
	os.Symlink("sub", root+"/in/inside")
	os.Symlink("/real", root+"/in/absolute")
	os.Symlink("..", root+"/in/parent")
	os.Symlink(outside, root+"/out")
	os.WriteFile(root+"/etc/shadow", []byte("secret"), 0o600)
	os.WriteFile(outside+"/x", []byte("untouched"), 0o600)
	newContainer(t, g, "chroot", root)

	for path, where := range map[string]string{"/abs": "real/1", "/up": "real/2", "/../../real": "real/3", "/in/parent/real/": "real/4", "/": "5"} {
		if err := g.put("chroot", path, fileEntry(filepath.Base(where), path)); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if b, err := os.ReadFile(filepath.Join(root, where)); string(b) != path || err != nil {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	if got, _, err := g.get("chroot", "/abs/1"); !slices.Equal(got, []string{"0 1 /abs"}) || err != nil {
		t.Errorf("get by an absolute symlink: %q, %v", got, err)
	}
	if err := g.put("chroot", "/in", fileEntry("inside/ok", "x"), dirEntry("inside/"), fileEntry("inside/ok2", "x")); err != nil {
		t.Errorf("by a symlink that stays inside: %v", err)
	}
	if b, _ := os.ReadFile(root + "/in/sub/ok2"); string(b) != "x" {
		t.Error("a symlink that stays inside was not followed")
	}
	before := listing(t, root) + listing(t, outside)
	for name, entries := range map[string][]*tar.Header{
		"up":                          {fileEntry("../x", "x")},
		"hidden up":                   {fileEntry("sub/../../x", "x")},
		"absolute":                    {fileEntry("/etc/x", "x")},
		"by a symlink that was there": {fileEntry("absolute/x", "x")},
		"by one to the parent":        {fileEntry("parent/x", "x")},
		"hard link up":                {hardEntry("sub/x", "../etc/shadow")},
		"hard link absolute":          {hardEntry("sub/x", "/etc/shadow")},
		"hard link by a symlink":      {hardEntry("sub/x", "parent/etc/shadow")},
		"hard link to itself":         {hardEntry("sub/ok", "sub/ok")},
		"over a directory by parent":  {dirEntry("parent")},
		"long name":                   {fileEntry(strings.Repeat("x", 256), "")},
		"device number":               {with(entryOf(tar.TypeBlock, "dev", 0o600), func(h *tar.Header) { h.Devminor = 1 << 20 })},
	} {
		if err := g.put("chroot", "/in", entries...); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, entry := range map[string]*tar.Header{"a file": fileEntry("sub", ""), "a symlink": linkEntry("sub", "/"), "a link": hardEntry("sub", "inside")} {
		if err := g.put("chroot", "/in", entry); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s over a directory: %v", name, err)
		}
	}
	if got := listing(t, root) + listing(t, outside); got != before {
		t.Errorf("got\n%s, want\n%s", got, before)
	}
	// With the symlink in the archive itself: nothing of what comes behind it.
	for _, leads := range []string{"/", "..", "../..", outside, "/proc/self/root"} {
		if err := g.put("chroot", "/in", linkEntry("evil", leads), fileEntry("evil/x", "x")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("by a symlink to %s: %v", leads, err)
		}
	}
	// A file takes the place of a symlink, and is not written through it.
	if err := g.put("chroot", "/in", linkEntry("evil", outside+"/x"), fileEntry("evil", "x")); err != nil {
		t.Error(err)
	}
	os.Remove(root + "/in/evil")
	if got := listing(t, root) + listing(t, outside); got != before {
		t.Errorf("got\n%s, want\n%s", got, before)
	}
}

// A container's mounts are where what is put goes, and they stay.
func TestMountsOfTheContainer(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	root := t.TempDir()
	for _, dir := range []string{"mnt", "etc"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"mounted", "etc/hosts"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte("at first"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	newContainer(t, g, "mounts", root)
	if err := g.put("mounts", "/", fileEntry("mnt/x", "in the tmpfs"), fileEntry("etc/hosts", "put")); err != nil {
		t.Fatal(err)
	}
	if err := g.put("mounts", "/etc", linkEntry("hosts", "x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a symlink in place of a mount: %v", err)
	}
	if got, _, err := g.get("mounts", "/mnt"); !slices.Equal(got, []string{"5 mnt/ ", "0 mnt/x in the tmpfs"}) || err != nil {
		t.Errorf("get: %q, %v", got, err)
	}
	want := "drwxr-xr-x . \ndrwxr-xr-x etc \n-rw-r--r-- etc/hosts at first\ndrwxr-xr-x mnt \n-rw-r--r-- mounted put\n"
	if got := listing(t, root); got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
	// There is 1 MiB.
	err := g.put("mounts", "/mnt", fileEntry("large", strings.Repeat("x", 2<<20)))
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("a full file system: %v", err)
	}
}

// While files are put into a directory, the container has it be a symlink to outside,
// over and again.
func TestPutWhileTheContainerSwapsSymlinks(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	root := t.TempDir()
	victim := filepath.Join(root, "victim")
	os.MkdirAll(root+"/in/real", 0o755)
	os.Mkdir(victim, 0o755)
	os.Symlink("../victim", root+"/in/link")
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, root+"/in/real", unix.AT_FDCWD, root+"/in/link", unix.RENAME_EXCHANGE)
			}
		}
	})
	outcomes := map[bool]int{}
	for i := range 500 {
		name := fmt.Sprintf("real/%d", i)
		err := g.put("c", root+"/in", fileEntry(name, "x"), dirEntry(name+".d"), hardEntry(name+".l", name), linkEntry(name+".s", "/"))
		outcomes[err == nil]++
	}
	close(stop)
	swapping.Wait()
	if got, err := os.ReadDir(victim); len(got) > 0 || err != nil {
		t.Errorf("outside the directory are %v, %v", got, err)
	}
	t.Logf("put: %d, refused: %d", outcomes[true], outcomes[false])
}

// The guest's refusal ends a Put, of what would take for ever.
func TestGuestGivesUp(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		archive, w := io.Pipe()
		defer archive.Close() // ends the writer
		go endless{}.WriteTo(w)
		if err := g.do(func(conn net.Conn) error { return files.Put(g.ctx, conn, "created", "/", archive) }); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Put: %v", err)
		}
	})
}

// A host that has had enough ends a Get, of what would take for ever.
func TestHostGivesUp(t *testing.T) {
	for name, carrier := range carriers {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, carrier(t), 1)
			path := filepath.Join(t.TempDir(), "large")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 1<<40); err != nil {
				t.Fatal(err)
			}
			for range 3 { // each needs the one slot there is
				enough := errors.New("enough")
				err := g.do(func(conn net.Conn) error {
					return files.Get(g.ctx, conn, "c", path, &failing{after: 4 << 20, err: enough})
				})
				if !errors.Is(err, enough) {
					t.Errorf("Get: %v", err)
				}
			}
		})
	}
}

// A failing writer takes so many bytes.
type failing struct {
	after int
	err   error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, f.err
	}
	return len(p), nil
}

func sparseEntries(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	holes := fileEntry("x", "")
	for key, value := range map[string]string{"size": "1000000000000", "numblocks": "1", "map": "999999999999,0"} {
		holes.PAXRecords["GNU+sparse."+key] = value
	}
	if err := archiveOf(&b, dirEntry("."), holes); err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(b.String(), "GNU+sparse.", "GNU.sparse.") // which no writer writes
}

func TestSparseFilesAreRefused(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	sent := sparseEntries(t)
	err := g.do(func(conn net.Conn) error { return files.Put(g.ctx, conn, "c", t.TempDir(), strings.NewReader(sent)) })
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("Put: %v", err)
	}
	err = g.do(func(conn net.Conn) error {
		return files.Sync(g.ctx, conn, g.path("x"), func(w io.Writer) error {
			_, err := io.WriteString(w, sent)
			return err
		})
	})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("Sync: %v", err)
	}
}

func TestGetOfADeepTree(t *testing.T) {
	g := newGuest(t, newPipes(t), 1)
	const depth = 1200 // more than the descriptors of a process in some places
	dir := t.TempDir()
	if err := os.MkdirAll(dir+strings.Repeat("/d", depth), 0o755); err != nil {
		t.Fatal(err)
	}
	got, _, err := g.get("c", dir)
	if len(got) != depth+1 || err != nil {
		t.Errorf("%d entries, %v", len(got), err)
	}
}

func TestServeEndsWithOperationsUnderWay(t *testing.T) {
	over(t, func(t *testing.T, g *guest) {
		var waiting sync.WaitGroup
		begun := make(chan struct{}, 2)
		for range 2 { // both for one target: the second waits for its turn
			waiting.Go(func() {
				if err := g.do(func(conn net.Conn) error {
					return files.Sync(g.ctx, conn, g.path("t"), func(w io.Writer) error {
						begun <- struct{}{}
						_, err := io.Copy(w, endless{})
						return err
					})
				}); err == nil {
					t.Error("a sync without an end ends well")
				}
			})
		}
		silent, err := g.ln.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		<-begun
		<-begun
		g.end()
		if err := g.result(); err != nil {
			t.Errorf("serve: %v", err)
		}
		waiting.Wait()
	})
}

// endless is an archive whose file has no end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func (endless) WriteTo(w io.Writer) (int64, error) {
	tw := tar.NewWriter(w)
	tw.WriteHeader(with(fileEntry(".", ""), func(h *tar.Header) { h.Size = 1 << 60 }))
	return io.Copy(tw, struct{ io.Reader }{endless{}})
}

func TestServeWithoutItsListener(t *testing.T) {
	ln := newPipes(t)
	ln.Close()
	if err := Serve(t.Context(), ln, t.TempDir(), nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

func TestThousandsOfOperationsLeaveNothing(t *testing.T) {
	g := newGuest(t, newSockets(t), 8)
	dir := t.TempDir()
	count := func() (goroutines, fds int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return runtime.NumGoroutine(), len(entries)
	}
	one := func(i int) error {
		name := fmt.Sprint(i % 20)
		switch i % 6 {
		case 0:
			return g.sync(name, version(fmt.Sprint(i), "a")...)
		case 1:
			return g.put("c", dir, fileEntry("d/"+name, "x"))
		case 2:
			_, _, err := g.get("c", "/proc/self/status")
			return err
		case 3: // gives up
			if err := g.do(func(conn net.Conn) error {
				return files.Sync(g.ctx, conn, g.path(name), func(io.Writer) error { return io.ErrClosedPipe })
			}); !errors.Is(err, io.ErrClosedPipe) {
				return fmt.Errorf("given up: %w", err)
			}
			return nil
		case 4: // says nothing it should
			return g.do(func(conn net.Conn) error {
				_, err := io.WriteString(conn, "HSK1")
				return err
			})
		}
		return g.do(func(conn net.Conn) error { return files.Drop(g.ctx, conn, g.path(name)) })
	}
	settle := func() { g.do(func(conn net.Conn) error { return files.Drop(g.ctx, conn, g.path("x")) }) }
	for i := range 12 {
		if err := one(i); err != nil {
			t.Fatal(i, err)
		}
	}
	settle()
	goroutines, fds := count()
	var workers sync.WaitGroup
	for w := range 6 {
		workers.Go(func() {
			for i := range 300 {
				if err := one(w + i); err != nil {
					t.Errorf("operation %d: %v", w+i, err)
				}
			}
		})
	}
	workers.Wait()
	until(t, "goroutines and descriptors are as before", func() bool {
		now, open := count()
		return now <= goroutines+1 && open <= fds+1 // the last connection may be on its way out
	})
}
