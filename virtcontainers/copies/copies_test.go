package copies

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestfiles "github.com/husk-containers/husk/agent/files"
	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/virtcontainers/inotify"
)

// limit bounds every wait; only a broken test meets it.
const limit = 60 * time.Second

// A sandbox is the guest's end, in a directory of this machine, and an inotify instance.
type sandbox struct {
	*testing.T
	dir     string // of copies
	inotify *inotify.Instance
	path    string
	broken  atomic.Pointer[error] // what Dial has instead
	log     *logged
}

func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	s := &sandbox{T: t, dir: filepath.Join(t.TempDir(), "copies"), path: filepath.Join(t.TempDir(), "channel"), log: &logged{}}
	ln, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- guestfiles.Serve(ctx, ln, s.dir, nil) }()
	s.inotify = inotify.New()
	t.Cleanup(func() {
		for range 2 {
			if err := s.inotify.Close(); err != nil {
				t.Error(err)
			}
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s
}

// logged is what a log has got.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (s *sandbox) dial(ctx context.Context) (net.Conn, error) {
	if err := s.broken.Load(); err != nil && *err != nil {
		return nil, *err
	}
	return (&net.Dialer{}).DialContext(ctx, "unix", s.path)
}

// options are those of a copy of what is at source, by O_PATH.
func (s *sandbox) options(source, name string) Options {
	s.Helper()
	fd, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		s.Fatal(err)
	}
	return Options{
		Source: os.NewFile(uintptr(fd), source), Target: filepath.Join(s.dir, name), Dial: s.dial, Inotify: s.inotify,
		Log: slog.New(slog.NewTextHandler(s.log, nil)),
	}
}

// copy begins a copy of what is at source, until the test ends.
func (s *sandbox) copy(source, name string) *Copy {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), limit)
	defer cancel()
	c, err := New(ctx, s.options(source, name))
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		for range 2 {
			if err := c.Close(); err != nil {
				s.Error(err)
			}
		}
	})
	return c
}

// watches counts them, as the kernel has them.
func watches(t *testing.T) (n int) {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		b, _ := os.ReadFile(fd) // it may be closed by now
		n += strings.Count(string(b), "inotify wd:")
	}
	return n
}

// read is what a file of a copy holds; an error's text where it cannot be read.
func (s *sandbox) read(name string) string {
	b, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// until waits for cond.
func (s *sandbox) until(what string, cond func() bool) {
	s.Helper()
	for deadline := time.Now().Add(limit); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("waited in vain: %s; log: %s", what, s.log)
		}
	}
}

func (s *sandbox) becomes(name, want string) {
	s.Helper()
	s.until(fmt.Sprintf("%s becomes %q", name, want), func() bool { return s.read(name) == want })
}

func (s *sandbox) vanishes(name string) {
	s.Helper()
	s.until(name+" vanishes", func() bool {
		_, err := os.Lstat(filepath.Join(s.dir, name))
		return errors.Is(err, os.ErrNotExist)
	})
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A volume is a directory that is written as the kubelet writes those of configMaps.
type volume struct {
	testing.TB
	dir     string
	n       int
	version string
}

// write switches the volume to files with that content, one for each key.
func (v *volume) write(content string, keys ...string) {
	v.Helper()
	v.n++
	next := fmt.Sprintf("..2026_01_01_%d", v.n)
	must := func(err error) {
		v.Helper()
		if err != nil {
			v.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(v.dir, next), 0o755))
	for _, key := range keys {
		write(v, filepath.Join(v.dir, next, key), content)
	}
	must(os.Symlink(next, filepath.Join(v.dir, "..data_tmp")))
	must(os.Rename(filepath.Join(v.dir, "..data_tmp"), filepath.Join(v.dir, dataLink)))
	for _, key := range keys {
		if err := os.Symlink(filepath.Join(dataLink, key), filepath.Join(v.dir, key)); err != nil && !errors.Is(err, os.ErrExist) {
			v.Fatal(err)
		}
	}
	if v.version != "" {
		entries, err := os.ReadDir(filepath.Join(v.dir, v.version))
		must(err)
		for _, e := range entries {
			if _, err := os.Stat(filepath.Join(v.dir, next, e.Name())); err != nil {
				must(os.Remove(filepath.Join(v.dir, e.Name())))
			}
		}
		must(os.RemoveAll(filepath.Join(v.dir, v.version)))
	}
	v.version = next
}

func TestAVolumeFollows(t *testing.T) {
	s := newSandbox(t)
	v := &volume{TB: t, dir: t.TempDir()}
	v.write("one", "a", "b")
	s.copy(v.dir, "v")
	if s.read("v/a") != "one" || s.read("v/b") != "one" {
		t.Errorf("at first: %q, %q", s.read("v/a"), s.read("v/b"))
	}
	begun := time.Now()
	v.write("two", "b", "c")
	s.becomes("v/b", "two")
	t.Logf("an update took %s", time.Since(begun))
	s.becomes("v/c", "two")
	s.vanishes("v/a")
	s.vanishes("v/..2026_01_01_1")
	if s.log.String() != "" {
		t.Errorf("log: %s", s.log)
	}
}

// Whatever is read while the volume is switched is of one version, and the end is
// the last one.
func TestQuickSwaps(t *testing.T) {
	const swaps = 1000
	s := newSandbox(t)
	v := &volume{TB: t, dir: t.TempDir()}
	keys := []string{"a", "b", "c"}
	v.write("0", keys...)
	s.copy(v.dir, "v")
	stop := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			dir, err := os.OpenRoot(filepath.Join(s.dir, "v", dataLink))
			if errors.Is(err, os.ErrNotExist) { // removed after the symlink was read, which there must be
				_, err = os.Lstat(filepath.Join(s.dir, "v", dataLink))
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
					break // it is being removed
				}
				if err != nil || len(b) == 0 || first != "" && string(b) != first {
					t.Errorf("%s of version %q is %q, %v", key, first, b, err)
				}
				first = string(b)
			}
			dir.Close()
		}
	})
	for i := range swaps {
		v.write(fmt.Sprint(i+1), keys...)
	}
	for _, key := range keys {
		s.becomes("v/"+key, fmt.Sprint(swaps))
	}
	close(stop)
	reading.Wait()
	s.until("one version is left", func() bool {
		versions, err := filepath.Glob(filepath.Join(s.dir, "v", "..2026*"))
		return len(versions) == 1 && err == nil
	})
}

func TestADirectoryFollows(t *testing.T) {
	s := newSandbox(t)
	dir := t.TempDir()
	write(t, dir+"/f", "1")
	if err := os.MkdirAll(dir+"/d/e", 0o755); err != nil {
		t.Fatal(err)
	}
	c := s.copy(dir, "d")
	write(t, dir+"/d/e/deep", "2") // in a directory that was there
	s.becomes("d/d/e/deep", "2")
	if err := os.MkdirAll(dir+"/new/er", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/new/er/f", "3") // in one that was not
	s.becomes("d/new/er/f", "3")
	write(t, dir+"/new/er/f", "4")
	s.becomes("d/new/er/f", "4")
	if err := os.Rename(dir+"/new/er", dir+"/moved"); err != nil {
		t.Fatal(err)
	}
	s.becomes("d/moved/f", "4")
	s.vanishes("d/new/er")
	if err := os.Chmod(dir+"/f", 0o640); err != nil {
		t.Fatal(err)
	}
	s.until("the mode follows", func() bool {
		info, err := os.Stat(filepath.Join(s.dir, "d/f"))
		return err == nil && info.Mode() == 0o640
	})
	f, err := os.OpenFile(dir+"/f", os.O_WRONLY|os.O_APPEND, 0) // stays open
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	io.WriteString(f, "more")
	s.becomes("d/f", "1more")
	if err := os.RemoveAll(dir + "/d"); err != nil {
		t.Fatal(err)
	}
	s.vanishes("d/d")
	// Directories that are gone are watched no longer: what is left is ., new, moved.
	s.until("watches are given back", func() bool { return watches(t) == 3 })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n := watches(t); n != 0 {
		t.Errorf("%d watches are left", n)
	}
	write(t, dir+"/f", "not any more")
	if got := s.read("d/f"); got != "1more" {
		t.Errorf("after Close it follows still: %q", got)
	}
}

func TestAFileFollows(t *testing.T) {
	s := newSandbox(t)
	path := filepath.Join(t.TempDir(), "hosts")
	write(t, path, "one")
	// Two containers' copies of one file are one watch.
	s.copy(path, "1")
	second := s.copy(path, "2")
	write(t, path, "two, longer")
	s.becomes("1", "two, longer")
	s.becomes("2", "two, longer")
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, path, "3")
	s.becomes("1", "3")
	if got := s.read("2"); got != "two, longer" {
		t.Errorf("after Close it follows still: %q", got)
	}
	conn, err := s.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if b, err := files.Read(t.Context(), conn, filepath.Join(s.dir, "1"), 100); string(b) != "3" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestMountsBelowTheSource(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts: needs root")
	}
	s := newSandbox(t)
	config, secret := &volume{TB: t, dir: t.TempDir()}, &volume{TB: t, dir: t.TempDir()}
	config.write("c1", "config")
	secret.write("s1", "secret")
	below := filepath.Join(config.dir, "secrets")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(secret.dir, below, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	detached := false
	detach := func() {
		if !detached {
			detached = true
			if err := unix.Unmount(below, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	defer detach()
	fd, err := unix.OpenTree(unix.AT_FDCWD, config.dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		t.Fatal(err)
	}
	detach() // the clone has its own
	opts := s.options(config.dir, "v")
	opts.Source.Close()
	opts.Source = os.NewFile(uintptr(fd), "clone")
	c, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if s.read("v/config") != "c1" || s.read("v/secrets/secret") != "s1" {
		t.Errorf("at first: %q, %q", s.read("v/config"), s.read("v/secrets/secret"))
	}
	inode := inodeOf(t, filepath.Join(s.dir, "v/secrets"))
	secret.write("s2", "secret")
	s.becomes("v/secrets/secret", "s2")
	config.write("c2", "config")
	s.becomes("v/config", "c2")
	if now := inodeOf(t, filepath.Join(s.dir, "v/secrets")); now != inode {
		t.Errorf("the place of the mount had inode %d, has %d", inode, now)
	}
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestFailuresAreToldOnceAndRetried(t *testing.T) {
	s := newSandbox(t)
	v := &volume{TB: t, dir: t.TempDir()}
	v.write("1", "a")
	s.copy(v.dir, "v")
	lines := func() int { return strings.Count(s.log.String(), "\n") }
	why := errors.New("the guest does not answer")
	s.broken.Store(&why)
	for i := range 20 {
		v.write(fmt.Sprint("lost ", i), "a")
	}
	s.until("the failure is told", func() bool { return lines() > 0 })
	other := errors.New("the guest is full")
	s.broken.Store(&other)
	v.write("lost", "a")
	s.until("the other failure is told", func() bool { return strings.Contains(s.log.String(), other.Error()) })
	if lines() != 2 || !strings.Contains(s.log.String(), why.Error()) {
		t.Errorf("log:\n%s", s.log)
	}
	var none error
	s.broken.Store(&none)
	v.write("2", "a")
	s.becomes("v/a", "2")
}

func TestAVolumeThatIsRemovedStaysAsItWas(t *testing.T) {
	s := newSandbox(t)
	v := &volume{TB: t, dir: filepath.Join(t.TempDir(), "v")}
	if err := os.Mkdir(v.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	keys := []string{"a", "b", "c", "d"}
	v.write("kept", keys...)
	s.copy(v.dir, "v")
	// What is removed goes one by one, first the files of the version.
	if err := os.Remove(filepath.Join(v.dir, v.version, "a")); err != nil {
		t.Fatal(err)
	}
	s.until("it is told", func() bool { return strings.Contains(s.log.String(), errVanished.Error()) })
	if err := os.RemoveAll(filepath.Join(v.dir, v.version)); err != nil {
		t.Fatal(err)
	}
	for _, key := range append(keys, dataLink) {
		if err := os.Remove(filepath.Join(v.dir, key)); err != nil {
			t.Fatal(err)
		}
	}
	// It is looked at again, and then there is another one.
	other := errors.New("looked at")
	s.broken.Store(&other)
	write(t, v.dir+"/last", "")
	s.until("it is looked at", func() bool { return strings.Contains(s.log.String(), other.Error()) })
	for _, key := range keys {
		if got := s.read("v/" + key); got != "kept" {
			t.Errorf("%s is %q", key, got)
		}
	}
	if n := strings.Count(s.log.String(), errVanished.Error()); n != 1 {
		t.Errorf("log:\n%s", s.log)
	}
	var none error
	s.broken.Store(&none)
	v.version = ""
	v.write("back", keys...)
	s.becomes("v/a", "back")
}

func TestAFileThatIsRemovedStaysAsItWas(t *testing.T) {
	s := newSandbox(t)
	path := filepath.Join(t.TempDir(), "hosts")
	write(t, path, "kept")
	s.copy(path, "hosts")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	s.until("it is told", func() bool { return strings.Contains(s.log.String(), errVanished.Error()) })
	if got := s.read("hosts"); got != "kept" {
		t.Errorf("the copy is %q", got)
	}
	if n := strings.Count(s.log.String(), "\n"); n != 1 {
		t.Errorf("log:\n%s", s.log)
	}
	dir := t.TempDir()
	opts := s.options(dir, "x")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), opts); !errors.Is(err, errVanished) {
		t.Errorf("a directory that is gone: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	s := newSandbox(t)
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	s.copy(t.TempDir(), "first") // makes the inotify instance
	before := runtime.NumGoroutine()
	for _, path := range []string{dir, dir + "/fifo"} {
		opts := s.options(path, "x")
		if _, err := New(t.Context(), opts); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "all that is copied") {
			t.Errorf("%s: %v", path, err)
		}
		if err := opts.Source.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the source of %s was not closed", path)
		}
	}
	opts := s.options(t.TempDir(), "x")
	opts.Target = "/elsewhere"
	if _, err := New(t.Context(), opts); !errdefs.IsInvalidArgument(err) {
		t.Errorf("target elsewhere: %v", err)
	}
	if n := watches(t); n != 1 {
		t.Errorf("%d watches are left, want the first one's", n)
	}
	s.until("goroutines are as before", func() bool { return runtime.NumGoroutine() <= before })
}

func TestAGuestThatHangs(t *testing.T) {
	s := newSandbox(t)
	dir := t.TempDir()
	opts := s.options(dir, "x")
	near, far := net.Pipe()
	defer far.Close()
	opts.Dial = func(context.Context) (net.Conn, error) { return near, nil }
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("given up")
	time.AfterFunc(10*time.Millisecond, func() { cancel(why) })
	if _, err := New(ctx, opts); !errors.Is(err, why) {
		t.Errorf("New: %v", err)
	}
	// Close does not wait for an update that hangs.
	hang := make(chan struct{}, 1)
	first := true
	opts = s.options(dir, "y")
	opts.Dial = func(ctx context.Context) (net.Conn, error) {
		if first {
			first = false
			return s.dial(ctx)
		}
		near, _ := net.Pipe()
		hang <- struct{}{}
		return near, nil
	}
	c, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/f", "x")
	<-hang
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// What only looks like an atomic writer's is copied as it is, and not waited for.
func TestDataThatLeadsToNoVersion(t *testing.T) {
	s := newSandbox(t)
	for name, leads := range map[string]string{"none": "..none", "file": "..file", "itself": dataLink, "up": ".."} {
		dir := t.TempDir()
		write(t, dir+"/..file", "x")
		if err := os.Symlink(leads, filepath.Join(dir, dataLink)); err != nil {
			t.Fatal(err)
		}
		s.copy(dir, name)
		if got, err := os.Readlink(filepath.Join(s.dir, name, dataLink)); got != leads || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestAtomicWriter(t *testing.T) {
	v := &volume{TB: t, dir: t.TempDir()}
	is := func(want bool) {
		t.Helper()
		fd, err := unix.Open(v.dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), v.dir)
		defer f.Close()
		if got, err := AtomicWriter(f); got != want || err != nil {
			t.Errorf("AtomicWriter: %t, %v, want %t", got, err, want)
		}
	}
	is(false)
	v.write("x", "a")
	is(true)
	data := filepath.Join(v.dir, dataLink)
	for leads, want := range map[string]bool{
		"..": false, ".": false, "a": false, "../..": false, "..none": false, v.version + "/": false, "/": false, v.version: true,
	} {
		os.Remove(data)
		if err := os.Symlink(leads, data); err != nil {
			t.Fatal(err)
		}
		is(want)
	}
	os.Remove(data)
	write(t, data, "")
	is(false)
	write(t, v.dir+"/file", "")
	fd, err := os.Open(v.dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	if got, err := AtomicWriter(fd); got || err != nil {
		t.Errorf("of a file: %t, %v", got, err)
	}
}
