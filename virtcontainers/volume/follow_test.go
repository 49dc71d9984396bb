package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func (g *fakeGuest) HoldFileSystems(ctx context.Context, r *agentv1.HoldFileSystemsRequest) (*agentv1.HoldFileSystemsResponse, error) {
	select {
	case g.held <- r:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return &agentv1.HoldFileSystemsResponse{}, errors.Join(g.err, r.Validate())
}

// following makes a host whose table follows it until stop, and a source of which the
// mounts propagate.
func following(t *testing.T, held int) (h host, src string, stop func()) {
	h = newHost(t)
	h.guest.held = make(chan *agentv1.HoldFileSystemsRequest, held)
	src = h.source()
	h.must(unix.Mount(src, src, "", unix.MS_BIND, ""))
	t.Cleanup(func() { mount.UnmountRecursive(src, unix.MNT_DETACH) }) //nolint:errcheck // the test's own
	h.must(unix.Mount("", src, "", unix.MS_SHARED, ""))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.table.Follow(ctx) }()
	return h, src, func() { cancel(); <-done }
}

// file mounts a tmpfs with a file "f".
func (h host) file(dir string) {
	h.Helper()
	h.tmpfs(dir, 64)
	h.must(os.WriteFile(filepath.Join(dir, "f"), nil, 0o600))
}

// until waits for a file to be there, or not to be, after a change of the mounts.
func (h host) until(path string, there bool) {
	h.Helper()
	ctx, cancel := context.WithCancel(h.Context())
	defer cancel()
	h.must(eachMount(ctx, func() {
		if _, err := os.Stat(path); (err == nil) == there {
			cancel()
		}
	}))
}

func (h host) wantHeld(paths ...string) {
	h.Helper()
	if got := <-h.guest.held; got.ContainerId != "c" || !slices.Equal(got.FileSystems, paths) {
		h.Errorf("the agent is told of %v, want %v", got, paths)
	}
}

func TestTheAgentIsToldOfLaterMounts(t *testing.T) {
	h, src, stop := following(t, 8)
	still, _ := h.add(src)
	m, path := h.add(src, "rslave")
	if dirs, err := m.FileSystems(); err != nil || !slices.Equal(dirs, []string{path}) {
		t.Errorf("file systems %v, %v", dirs, err)
	}
	later := filepath.Join(src, "later")
	h.file(later)
	h.wantHeld(path + "/later")

	// The guest has it open, and the host can unmount it.
	file, err := os.OpenFile(filepath.Join(h.seen(path), "later", "f"), unix.O_PATH, 0)
	h.must(err)
	defer file.Close() //nolint:errcheck // a path only
	h.must(unix.Unmount(later, 0))
	h.until(filepath.Join(h.seen(path), "later", "f"), false)
	h.tmpfs(filepath.Join(src, "other"), 64)
	h.wantHeld(path + "/other")
	h.file(later) // again
	h.wantHeld(path + "/later")

	h.release(m, still)
	h.tmpfs(filepath.Join(src, "latest"), 64)
	stop()
	if len(h.guest.held) > 0 {
		t.Errorf("of a container that is gone the agent is told of %v", <-h.guest.held)
	}
	for _, dir := range []string{"latest", "other", "later", ""} {
		h.must(unix.Unmount(filepath.Join(src, dir), 0))
	}
	if left := h.left(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if left, err := os.ReadDir(h.dir); err != nil || len(left) != 2 {
		t.Errorf("left beside the shared directory: %v, %v", left, err)
	}
}

// What is unmounted goes although the guest does not answer, and what it refused it is
// told of again.
func TestTheHostsMountsDoNotWaitForTheGuest(t *testing.T) {
	h, src, stop := following(t, 0)
	m, path := h.add(src, "rslave")
	_, err := m.FileSystems()
	h.must(err)
	h.guest.mu.Lock()
	h.guest.err = errGone
	h.guest.mu.Unlock()
	one, two := filepath.Join(src, "one"), filepath.Join(src, "two")
	h.file(one)
	h.until(filepath.Join(h.seen(path), "one", "f"), true)
	h.file(two)
	h.until(filepath.Join(h.seen(path), "two", "f"), true)
	h.must(unix.Unmount(two, 0))
	h.until(filepath.Join(h.seen(path), "two", "f"), false)
	<-h.guest.held
	h.file(filepath.Join(src, "three"))
	for { // whatever came of the mounts before
		if got := (<-h.guest.held).FileSystems; slices.Contains(got, path+"/three") {
			if !slices.Contains(got, path+"/one") {
				t.Errorf("the agent is told of %v, and not again of what it did not take", got)
			}
			break
		}
	}
	stop()
	h.release(m)
}

// A file of the host can be bound that way, too: nothing can come below it.
func TestAFileThatFollows(t *testing.T) {
	h, src, stop := following(t, 8)
	m, path := h.add(filepath.Join(src, "f"), "rslave")
	if text, err := os.ReadFile(h.seen(path)); err != nil || string(text) != "precious" {
		t.Errorf("the guest has %q, %v", text, err)
	}
	h.release(m)
	stop()
	h.must(unix.Unmount(src, 0))
}
