package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
)

// A fakeGuest keeps what it is asked for.
type fakeGuest struct {
	agentv1.AgentClient

	mu      sync.Mutex
	mounted []*agentv1.MountStorageRequest
	removed []string
	err     error // of every call
	held    chan *agentv1.HoldFileSystemsRequest
}

func (g *fakeGuest) Call(ctx context.Context, f func(context.Context, agentv1.AgentClient) error) error {
	return f(ctx, g)
}

func (g *fakeGuest) Lost(err error) bool { return errors.Is(err, errGone) }

func (g *fakeGuest) Dial(context.Context, uint32) (net.Conn, error) { return nil, g.err }

func (g *fakeGuest) MountStorage(_ context.Context, r *agentv1.MountStorageRequest) (*agentv1.MountStorageResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mounted = append(g.mounted, r)
	return &agentv1.MountStorageResponse{}, errors.Join(g.err, r.Validate())
}

func (g *fakeGuest) UnmountStorage(_ context.Context, r *agentv1.UnmountStorageRequest) (*agentv1.UnmountStorageResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removed = append(g.removed, r.Target)
	return &agentv1.UnmountStorageResponse{}, errors.Join(g.err, r.Validate())
}

var errGone = errors.New("the guest is gone")

// A host has a table of volumes, whose mounts propagate as the shim's do.
type host struct {
	*testing.T
	dir, share string
	guest      *fakeGuest
	table      *Table
}

func newHost(t *testing.T) host {
	t.Helper()
	h := host{T: t, dir: t.TempDir(), guest: &fakeGuest{}}
	private := filepath.Join(h.dir, "private")
	h.share = filepath.Join(h.dir, "share")
	h.must(unix.Mount(h.dir, h.dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { h.must(mount.UnmountRecursive(h.dir, unix.MNT_DETACH)) })
	h.must(unix.Mount("", h.dir, "", unix.MS_SHARED, ""))
	h.must(storage.Expose(private, h.share))
	h.must(os.Mkdir(filepath.Join(private, Dir), 0o700))
	h.table = New(Options{Private: private, Stage: h.dir, Clone: storage.Here{}.Clone, Guest: h.guest})
	return h
}

func (h host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// source makes a directory of the host with a file "f".
func (h host) source() string {
	h.Helper()
	dir := h.TempDir()
	h.must(os.WriteFile(filepath.Join(dir, "f"), []byte("precious"), 0o600))
	return dir
}

// tmpfs mounts one of that many KiB, as the kubelet does for an emptyDir.
func (h host) tmpfs(dir string, kib int) {
	h.Helper()
	h.must(os.MkdirAll(dir, 0o700))
	h.must(unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)))
	h.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) }) //nolint:errcheck // the test may have
}

// bind makes a container's mount of source by way of its spec.
func bind(t *testing.T, source string, options ...string) (*spec.Bind, *specs.Mount) {
	t.Helper()
	p, err := spec.Transform(&specs.Spec{
		Root: &specs.Root{Path: "rootfs"}, Process: &specs.Process{}, Linux: &specs.Linux{},
		Mounts: []specs.Mount{{Destination: "/mnt", Type: "bind", Source: source, Options: options}},
	}, "c", false)
	if err != nil {
		t.Fatal(err)
	}
	return p.Binds[0], &p.Spec.Mounts[0]
}

// add mounts source, and returns where the guest has it.
func (h host) add(source string, options ...string) (*Mount, string) {
	h.Helper()
	b, m := bind(h.T, source, append(options, "rbind")...)
	mnt, err := h.table.Add(h.Context(), User{ID: "c", Bundle: "/bundle", Spec: &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}}, b)
	h.must(err)
	h.must(mnt.Ready(h.Context()))
	return mnt, m.Source
}

// seen is what the guest has at a path below the share.
func (h host) seen(path string) string {
	rel, ok := strings.CutPrefix(path, spec.GuestShare)
	if !ok {
		h.Fatalf("%s is not below %s", path, spec.GuestShare)
	}
	return h.share + rel
}

func (h host) release(mounts ...*Mount) {
	h.Helper()
	for _, m := range mounts {
		h.must(m.Release(h.Context()))
	}
}

// left lists what is left of volumes.
func (h host) left() []fs.DirEntry {
	h.Helper()
	entries, err := os.ReadDir(filepath.Join(h.share, Dir))
	h.must(err)
	return entries
}

func TestContainersShareAVolume(t *testing.T) {
	h := newHost(t)
	src := h.source()
	one, first := h.add(src)
	two, second := h.add(src)
	readOnly, third := h.add(src, "ro")
	file, fourth := h.add(filepath.Join(src, "f"))
	if first != second || first != third || first == fourth {
		t.Errorf("the guest has %s, %s, %s, and the file at %s", first, second, third, fourth)
	}
	h.must(os.WriteFile(filepath.Join(h.seen(first), "new"), nil, 0o600))
	if _, err := os.Stat(filepath.Join(src, "new")); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(filepath.Dir(h.seen(fourth))); err != nil || len(entries) != 2 {
		t.Errorf("beside a file that is mounted: %v, %v", entries, err)
	}
	h.release(one, two)
	if _, err := os.Stat(filepath.Join(h.seen(first), "f")); err != nil {
		t.Errorf("the volume is gone with a container that is left: %v", err)
	}
	h.release(readOnly, file)
	if left := h.left(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	again, fifth := h.add(src)
	if fifth == first {
		t.Errorf("the path %s is used again: a guest could still know it", first)
	}
	h.release(again)
}

// A container that may only read does not open the source to writing by the guest.
func TestReadOnlyIsEnforcedOnTheHost(t *testing.T) {
	h := newHost(t)
	src := h.source()
	ro, path := h.add(src, "ro")
	if err := os.WriteFile(filepath.Join(h.seen(path), "f"), nil, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	rw, other := h.add(src)
	if other == path {
		t.Error("a writable mount got the read-only one")
	}
	h.release(ro, rw)
}

func TestSourcesThatCannotBeMounted(t *testing.T) {
	h := newHost(t)
	src := h.source()
	h.must(unix.Mkfifo(filepath.Join(src, "p"), 0o600))
	h.must(os.Symlink("loop", filepath.Join(src, "loop")))
	for source, tt := range map[string]struct {
		want  string
		class func(error) bool
	}{
		src + "/none":   {"mounts[0] (/mnt): source " + src + "/none does not exist on the host", errdefs.IsNotFound},
		"relative":      {"source /bundle/relative does not exist", errdefs.IsNotFound},
		src + "/loop":   {"is a loop of symbolic links", errdefs.IsInvalidArgument},
		src + "/f/g":    {"a part of the path is not a directory", errdefs.IsInvalidArgument},
		src + "/p":      {"source " + src + "/p is a fifo", errdefs.IsNotImplemented},
		"/proc/self/ns": {"is a proc file system", errdefs.IsNotImplemented},
	} {
		b, _ := bind(t, source)
		_, err := h.table.Add(t.Context(), User{Bundle: "/bundle", Spec: &specs.Spec{}}, b)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !tt.class(err) {
			t.Errorf("%s: %v, want %q", source, err, tt.want)
		}
	}
	if left := h.left(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestMemoryIsTheGuests(t *testing.T) {
	h := newHost(t)
	dir := filepath.Join(h.TempDir(), "cache")
	h.tmpfs(dir, 512)
	h.must(os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	h.must(os.Chmod(filepath.Join(dir, "sub"), fs.ModeSetgid|0o777))
	h.must(os.Chown(filepath.Join(dir, "sub"), 7, 8))
	m, path := h.add(dir)
	if path != agentv1.VolumesDir+"/1" || len(h.guest.mounted) != 2 {
		t.Fatalf("the guest has %s, and was told %v", path, h.guest.mounted)
	}
	got := h.guest.mounted[0].Storage
	if got.Kind != agentv1.Storage_KIND_TMPFS || got.Target != path || got.SizeBytes != 512<<10 || got.Mode != 0o1777 {
		t.Errorf("storage %v", got)
	}
	if d := h.guest.mounted[1].Directories; len(d) != 1 || d[0].Path != "sub" || d[0].Mode != 0o2777 || d[0].Uid != 7 || d[0].Gid != 8 {
		t.Errorf("directories %v", d)
	}

	// The next container finds it again, although the first has gone, and a sub-path
	// of it, by whatever mount.
	h.release(m)
	other := filepath.Join(h.TempDir(), "subpath")
	h.must(os.Mkdir(other, 0o700))
	h.must(unix.Mount(filepath.Join(dir, "sub"), other, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })  //nolint:errcheck // the test's own
	h.must(os.WriteFile(filepath.Join(other, "f"), nil, 0o600)) // of the host: it does not matter any more
	sub, second := h.add(other)
	if second != path+"/sub" {
		t.Errorf("a sub-path is at %s, want %s/sub", second, path)
	}
	h.release(sub)
	if len(h.guest.removed) > 0 {
		t.Errorf("removed: %v", h.guest.removed)
	}

	// Nothing of the host's is held.
	h.must(unix.Unmount(other, 0))
	h.must(unix.Unmount(dir, 0))
}

// Nor is a tmpfs the guest's that holds a file, is not for all to write, or is the
// host's own.
func TestOtherTmpfsStaysTheHosts(t *testing.T) {
	h := newHost(t)
	filled, closed := filepath.Join(h.TempDir(), "filled"), filepath.Join(h.TempDir(), "closed")
	h.tmpfs(filled, 64)
	h.must(os.WriteFile(filepath.Join(filled, "f"), nil, 0o600))
	h.tmpfs(closed, 64)
	h.must(os.Chmod(closed, 0o755))
	h.tmpfs("/dev/shm", 64) // in the tests' own mount namespace
	for _, dir := range []string{filled, closed, "/dev/shm"} {
		m, path := h.add(dir)
		if !strings.HasPrefix(path, spec.GuestShare) {
			t.Errorf("%s is %s in the guest", dir, path)
		}
		h.release(m)
	}
}

func TestMemoryThatTheGuestDoesNotHave(t *testing.T) {
	h := newHost(t)
	dir := filepath.Join(h.TempDir(), "cache")
	h.tmpfs(dir, 512)
	h.guest.err = errdefs.ErrResourceExhausted
	b, _ := bind(t, dir)
	m, err := h.table.Add(t.Context(), User{Spec: &specs.Spec{}}, b)
	h.must(err)
	if err := m.Ready(t.Context()); !errdefs.IsResourceExhausted(err) || !strings.HasPrefix(err.Error(), "mounts[0] (/mnt): ") {
		t.Errorf("%v", err)
	}
	h.guest.err = nil
	h.release(m)
	if !slices.Equal(h.guest.removed, []string{agentv1.VolumesDir + "/1"}) {
		t.Errorf("removed: %v", h.guest.removed)
	}
	m, path := h.add(dir) // another try
	if path != agentv1.VolumesDir+"/2" {
		t.Errorf("the guest has %s", path)
	}
	h.guest.err = errGone
	h.release(m)
}

func TestDevicesAreTheGuests(t *testing.T) {
	h := newHost(t)
	m, path := h.add("/dev/null")
	if path != (agentv1.Device{Kind: 'c', Major: 1, Minor: 3}).Node() {
		t.Errorf("the guest has %s", path)
	}
	h.release(m)
	dev := h.TempDir()
	h.must(unix.Mount("dev", dev, "devtmpfs", 0, ""))
	t.Cleanup(func() { unix.Unmount(dev, unix.MNT_DETACH) }) //nolint:errcheck // the test's own
	all, path := h.add(dev)
	if path != "/dev" {
		t.Errorf("the guest has %s in place of /dev", path)
	}
	h.release(all)
}
