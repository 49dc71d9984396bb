package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const insideEnv = "HUSK_TEST_STORAGE_INSIDE"

// TestMain runs the tests in a process with a mount namespace of its own.
func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	err := cmd.Run()
	if cmd.ProcessState == nil { // no namespace can be made: the tests skip
		fmt.Fprintln(os.Stderr, err)
		os.Exit(m.Run())
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// memory is a machine with so many huge pages of 2 MiB free or in the pool.
type memory struct{ pool, most, surplus, overcommit uint64 }

const hugePage = 2 << 20

func (m *memory) Get(pageBytes uint64) (pool, error) {
	if pageBytes != hugePage {
		return pool{}, fmt.Errorf("no such pages: %w", errdefs.ErrNotFound)
	}
	return pool{m.pool, m.surplus, m.overcommit}, nil
}

func (m *memory) Set(_, pages uint64) error {
	if pages > m.pool {
		m.surplus -= min(m.surplus, pages-m.pool)
	}
	m.pool = min(pages, m.most)
	return nil
}

func (m *memory) SetOvercommit(_, pages uint64) error {
	m.overcommit = pages
	return nil
}

func (m *memory) Memory() (uint64, error) { return 24*hugePage + 1, nil }

func newSet(t *testing.T) (*Set, *memory) {
	t.Helper()
	if os.Getenv(insideEnv) == "" {
		t.Skip("mounting needs root")
	}
	dir := filepath.Join(t.TempDir(), "volumes")
	s, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for target := range s.mounted {
			if err := s.UnmountStorage(context.Background(), target); err != nil {
				t.Error(err)
			}
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	m := &memory{pool: 3, most: 20, overcommit: 1}
	s.pools = m
	return s, m
}

func (s *Set) tmpfs(name string) *agentv1.Storage {
	return &agentv1.Storage{Kind: agentv1.Storage_KIND_TMPFS, Target: s.volumes + "/" + name, Mode: 0o777}
}

func (s *Set) hugetlbfs(name string, bytes uint64) *agentv1.Storage {
	return &agentv1.Storage{
		Kind: agentv1.Storage_KIND_HUGETLBFS, Target: s.volumes + "/" + name, Mode: 0o2775, Gid: 7,
		PageBytes: hugePage, SizeBytes: bytes,
	}
}

// stat is mode, owner and group of a file.
func stat(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%o %d %d", st.Mode, st.Uid, st.Gid)
}

func fstype(t *testing.T, path string) (magic, bytes, flags int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Type, int64(st.Blocks) * st.Bsize, st.Flags
}

func TestMemory(t *testing.T) {
	s, _ := newSet(t)
	st := s.tmpfs("0")
	st.SizeBytes, st.Mode, st.Uid, st.Gid = 1<<20, 0o2770, 5, 6
	dirs := []*agentv1.Directory{{Path: "a", Mode: 0o750, Uid: 1, Gid: 2}, {Path: "a/b", Mode: 0o1777}}
	if err := s.MountStorage(t.Context(), st, dirs); err != nil {
		t.Fatal(err)
	}
	magic, bytes, flags := fstype(t, st.Target)
	if magic != unix.TMPFS_MAGIC || bytes != 1<<20 || flags&(unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY) != 0 {
		t.Errorf("type %#x of %d bytes, flags %#x", magic, bytes, flags)
	}
	for path, want := range map[string]string{"": "42770 5 6", "a": "40750 1 2", "a/b": "41777 0 0"} {
		if got := stat(t, filepath.Join(st.Target, path)); got != want {
			t.Errorf("%q: %s, want %s", path, got, want)
		}
	}
	// Again: what is there stays as it is, what is missing is made.
	if err := os.WriteFile(st.Target+"/a/file", []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	dirs[0].Mode = 0o700
	if err := s.MountStorage(t.Context(), st, append(dirs, &agentv1.Directory{Path: "c", Mode: 0o711})); err != nil {
		t.Fatal(err)
	}
	if got := stat(t, st.Target+"/a") + stat(t, st.Target+"/c"); got != "40750 1 240711 0 0" {
		t.Errorf("a and c: %s", got)
	}
	if data, err := os.ReadFile(st.Target + "/a/file"); string(data) != "kept" {
		t.Errorf("%q, %v", data, err)
	}
	other := s.tmpfs("0")
	if err := s.MountStorage(t.Context(), other, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another one at the same target: %v", err)
	}

	// In use, it goes nevertheless; twice is as once.
	f, err := os.Open(st.Target + "/a/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 {
		if err := s.UnmountStorage(t.Context(), st.Target); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(st.Target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is there: %v", err)
	}
	if err := s.MountStorage(t.Context(), other, nil); err != nil { // the target is free
		t.Error(err)
	}
}

func TestMemoryOfTheKernelsDefaultSizeAndReadOnly(t *testing.T) {
	s, _ := newSet(t)
	st := s.tmpfs("0")
	st.ReadOnly = true
	if err := s.MountStorage(t.Context(), st, []*agentv1.Directory{{Path: "a"}}); err != nil {
		t.Fatal(err)
	}
	if _, bytes, flags := fstype(t, st.Target); bytes < 64<<20 || flags&unix.MS_RDONLY == 0 {
		t.Errorf("%d bytes, flags %#x", bytes, flags)
	}
	if got := stat(t, st.Target+"/a"); got != "40000 0 0" {
		t.Errorf("a: %s", got)
	}
}

// TestLinksLeadNowhere has a container put links where the host wants directories.
func TestLinksLeadNowhere(t *testing.T) {
	s, _ := newSet(t)
	outside := t.TempDir()
	st := s.tmpfs("0")
	if err := s.MountStorage(t.Context(), st, nil); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"absolute": outside, "up": "../../..", "dangling": outside + "/new"} {
		if err := os.Symlink(to, st.Target+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(st.Target+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"absolute/x": "path escapes from parent", "up/x": "path escapes from parent",
		"absolute": "and a L---------", "dangling": "and a L---------", "file": "it is there",
		"file/x": "not a directory", "none/x": "no such file",
	} {
		err := s.MountStorage(t.Context(), st, []*agentv1.Directory{{Path: path, Mode: 0o777}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v, want %q", path, err, want)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}

func TestFailureLeavesNothing(t *testing.T) {
	s, m := newSet(t)
	long := []*agentv1.Directory{{Path: "none/x"}}
	for _, st := range []*agentv1.Storage{s.tmpfs("t"), s.hugetlbfs("h", 4*hugePage)} {
		if err := s.MountStorage(t.Context(), st, long); err == nil {
			t.Errorf("%s: no error", st.Target)
		}
	}
	for target, want := range map[string]error{"/tmp/elsewhere": errdefs.ErrInvalidArgument} {
		st := s.tmpfs("x")
		st.Target = target
		if err := s.MountStorage(t.Context(), st, nil); !errors.Is(err, want) {
			t.Errorf("%s: %v", target, err)
		}
	}
	share := &agentv1.Storage{Kind: agentv1.Storage_KIND_VIRTIOFS, Source: "none", Target: s.volumes + "/s"}
	if err := s.MountStorage(t.Context(), share, nil); err == nil || !strings.Contains(err.Error(), `mount share "none" on `+share.Target) {
		t.Errorf("a share that is not there: %v", err)
	}
	if err := s.MountStorage(t.Context(), share, long); !errdefs.IsInvalidArgument(err) {
		t.Errorf("directories in a share: %v", err)
	}
	if left, err := os.ReadDir(s.volumes); err != nil || len(left) != 0 || len(s.mounted) != 0 || m.pool != 3 {
		t.Errorf("left are %v, %v, %v, a pool of %d pages", left, s.mounted, err, m.pool)
	}
}

func TestHugePages(t *testing.T) {
	s, m := newSet(t)
	st := s.hugetlbfs("0", 4*hugePage+1)
	for range 2 { // the second time it is there
		if err := s.MountStorage(t.Context(), st, []*agentv1.Directory{{Path: "d", Mode: 0o700}}); err != nil {
			t.Fatal(err)
		}
	}
	if m.pool != 3+5 {
		t.Errorf("a pool of %d pages", m.pool)
	}
	if magic, _, _ := fstype(t, st.Target); magic != unix.HUGETLBFS_MAGIC {
		t.Errorf("type %#x", magic)
	}
	if got := stat(t, st.Target); got != "42775 0 7" {
		t.Errorf("%s", got)
	}
	// One for which no pages are reserved, and one for which there are too few.
	if err := s.MountStorage(t.Context(), s.hugetlbfs("1", 0), nil); err != nil || m.pool != 8 {
		t.Errorf("%v, a pool of %d pages", err, m.pool)
	}
	err := s.MountStorage(t.Context(), s.hugetlbfs("2", 100*hugePage), nil)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "has room for 12 of 100 huge pages of 2048 kB: give the VM more memory") || m.pool != 8 {
		t.Errorf("%v, a pool of %d pages", err, m.pool)
	}
	gigantic := s.hugetlbfs("3", 1<<30)
	gigantic.PageBytes = 1 << 30
	if err := s.MountStorage(t.Context(), gigantic, nil); !errdefs.IsNotFound(err) {
		t.Errorf("pages that there are not: %v", err)
	}
	for range 2 {
		if err := s.UnmountStorage(t.Context(), st.Target); err != nil || m.pool != 3 {
			t.Errorf("%v, a pool of %d pages", err, m.pool)
		}
	}
}

// Volumes without a size get their pages on demand, as long as there is one of them.
func TestHugePagesOnDemand(t *testing.T) {
	s, m := newSet(t)
	volumes := []*agentv1.Storage{s.hugetlbfs("0", 0), s.hugetlbfs("1", 0)}
	for _, st := range volumes {
		if err := s.MountStorage(t.Context(), st, nil); err != nil || m.pool != 3 || m.overcommit != 21 {
			t.Errorf("%v, a pool of %+v", err, *m)
		}
	}
	if err := s.MountStorage(t.Context(), s.hugetlbfs("2", 0), []*agentv1.Directory{{Path: "none/x"}}); err == nil {
		t.Error("no error")
	}
	for i, st := range volumes {
		if want := []uint64{21, 1}[i]; s.UnmountStorage(t.Context(), st.Target) != nil || m.overcommit != want {
			t.Errorf("a pool of %+v, want %d on demand", *m, want)
		}
	}
}

// Pages that are in use beyond the pool are none for a volume that has a size.
func TestHugePagesBesideThoseOnDemand(t *testing.T) {
	p := &memory{pool: 3, most: 20, surplus: 2}
	pages, err := addPages(p, hugePage, 4*hugePage)
	if err != nil || p.pool != 3+2+4 || p.surplus != 0 {
		t.Errorf("%v, a pool of %+v", err, *p)
	}
	if err := removePages(p, hugePage, pages); err != nil || p.pool != 3 {
		t.Errorf("%v, a pool of %+v", err, *p)
	}
}

// TestKernelsPools reads what this machine's kernel has, and leaves it.
func TestKernelsPools(t *testing.T) {
	const s = sysfs("/sys/kernel/mm/hugepages")
	have, err := s.Get(hugePage)
	if errdefs.IsNotFound(err) {
		t.Skip("this machine's kernel has no huge pages of that size: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := s.Set(hugePage, have.pages); errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			t.Skip("this machine's /sys may not be written: ", err)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Get(3 << 20); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "2048kB") {
		t.Errorf("pages of 3 MiB: %v", err)
	}
}

// TestKernelsHugePages takes pages of the kernel's own pool, which on a host are not
// a test's to take: the end-to-end tests run it in a guest.
func TestKernelsHugePages(t *testing.T) {
	if os.Getenv("HUSK_TEST_IN_GUEST") == "" {
		t.Skip("not in a guest")
	}
	s, _ := newSet(t)
	s.pools = sysfs("/sys/kernel/mm/hugepages")
	has := func(pages, surplus uint64) {
		t.Helper()
		if got, err := s.pools.Get(hugePage); got != (pool{pages: pages, surplus: surplus}) || err != nil {
			t.Errorf("a pool of %+v, %v, want %d pages and %d", got, err, pages, surplus)
		}
	}
	st := s.hugetlbfs("0", 6*hugePage)
	if err := s.MountStorage(t.Context(), st, nil); err != nil {
		t.Fatal(err)
	}
	has(6, 0)
	f, err := os.Create(st.Target + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// All of the volume can be had, and no more.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 6*hugePage); err != nil {
		t.Error(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 6*hugePage, hugePage); err != unix.ENOSPC {
		t.Errorf("a page more: %v", err)
	}
	err = s.MountStorage(t.Context(), s.hugetlbfs("1", 1<<40), nil)
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("more than there is memory: %v", err)
	}
	t.Log(err)
	has(6, 0)
	if err := s.UnmountStorage(t.Context(), st.Target); err != nil {
		t.Fatal(err)
	}
	has(0, 6) // the file is open
	f.Close()
	has(0, 0)
}

// TestKernelsHugePagesOnDemand maps a file of a volume without a size.
func TestKernelsHugePagesOnDemand(t *testing.T) {
	if os.Getenv("HUSK_TEST_IN_GUEST") == "" {
		t.Skip("not in a guest")
	}
	s, _ := newSet(t)
	s.pools = sysfs("/sys/kernel/mm/hugepages")
	before, err := s.pools.Get(hugePage)
	if err != nil {
		t.Fatal(err)
	}
	st := s.hugetlbfs("0", 0)
	if err := s.MountStorage(t.Context(), st, nil); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(st.Target + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data, err := unix.Mmap(int(f.Fd()), 0, 4*hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(data); i += hugePage {
		data[i] = 1
	}
	if got, err := s.pools.Get(hugePage); got.pages != before.pages || got.surplus != 4 || err != nil {
		t.Errorf("a pool of %+v, %v, was %+v", got, err, before)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 1<<40, unix.PROT_READ, unix.MAP_SHARED); err != unix.ENOMEM {
		t.Errorf("more than there is memory: %v", err)
	}
	if err := s.UnmountStorage(t.Context(), st.Target); err != nil {
		t.Fatal(err)
	}
	// What is in use stays, but no more is to be had.
	if got, err := s.pools.Get(hugePage); got.overcommit != before.overcommit || got.surplus != 4 || err != nil {
		t.Errorf("unmounted: a pool of %+v, %v", got, err)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 5*hugePage, unix.PROT_READ, unix.MAP_SHARED); err != unix.ENOMEM {
		t.Errorf("a page more: %v", err)
	}
	f.Close()
	if err := unix.Munmap(data); err != nil {
		t.Fatal(err)
	}
	if got, err := s.pools.Get(hugePage); got != before || err != nil {
		t.Errorf("at the end: a pool of %+v, %v, was %+v", got, err, before)
	}
}

// TestPropagation mounts a volume that a slave of the directory is to see.
func TestPropagation(t *testing.T) {
	s, _ := newSet(t)
	slave := t.TempDir()
	for _, step := range []error{
		unix.Mount(s.volumes, slave, "", unix.MS_BIND, ""),
		unix.Mount("", slave, "", unix.MS_SLAVE, ""),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	defer unix.Unmount(slave, unix.MNT_DETACH) //nolint:errcheck // the namespace ends
	if err := s.MountStorage(t.Context(), s.tmpfs("later"), []*agentv1.Directory{{Path: "d"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(slave + "/later/d"); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("own", slave+"/later", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.volumes + "/later/d"); err != nil {
		t.Errorf("the slave's own mount has come back: %v", err)
	}
}

func TestCallsAreServedInTurn(t *testing.T) {
	s, _ := newSet(t)
	<-s.turn // somebody is at it
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.MountStorage(ctx, s.tmpfs("0"), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := s.UnmountStorage(ctx, s.volumes+"/0"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	s.give()
}
