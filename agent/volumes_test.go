package agent_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func TestStorageAfterConfigure(t *testing.T) {
	g := newGuest(t)
	st := &agentv1.Storage{Kind: agentv1.Storage_KIND_TMPFS, Target: agentv1.VolumesDir + "/0", SizeBytes: 1 << 20, Mode: 0o777}
	if _, err := g.MountStorage(g.ctx, &agentv1.MountStorageRequest{Storage: st, Directories: []*agentv1.Directory{{Path: "a"}}}); err != nil {
		t.Error(err)
	}
	if _, err := g.UnmountStorage(g.ctx, &agentv1.UnmountStorageRequest{Target: st.Target}); err != nil {
		t.Error(err)
	}
	want := []string{"mount KIND_TMPFS on /run/husk/volumes/0 size=1048576 mode=777 directories=1", "unmount /run/husk/volumes/0"}
	if diff := cmp.Diff(want, g.platform.Calls()); diff != "" {
		t.Error(diff)
	}
}

func TestHoldFileSystems(t *testing.T) {
	g := newGuest(t)
	hold := func(id string) error {
		_, err := g.HoldFileSystems(g.ctx, &agentv1.HoldFileSystemsRequest{ContainerId: id, FileSystems: []string{"/run/husk/share/.volumes/0"}})
		return errgrpc.ToNative(err)
	}
	if err := hold("c"); !errdefs.IsNotFound(err) {
		t.Errorf("of no container: %v", err)
	}
	g.start("c", g.open(false, false), "sleep", "1000")
	if err := hold("c"); err != nil {
		t.Error(err)
	}
}

func TestDevices(t *testing.T) {
	fuse, other := agentv1.Device{Kind: 'c', Major: 10, Minor: 229}, agentv1.Device{Kind: 'b', Major: 8, Minor: 1}
	g := newGuest(t)
	g.platform.Devices = map[agentv1.Device]bool{fuse: true}
	create := func(source string) error {
		spec := &specs.Spec{
			Root:    &specs.Root{Path: "/run/husk/share/c/rootfs"},
			Process: process(false, "true"),
			Linux:   &specs.Linux{CgroupsPath: "/husk/c", Namespaces: g.namespaces},
			Mounts:  []specs.Mount{{Destination: "/dev/x", Type: "bind", Source: source, Options: []string{"bind"}}},
		}
		g.spec("c", spec.Process) // for its root file system
		s := g.open(false, false)
		_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: g.json(spec), Streams: s.streams})
		return errgrpc.ToNative(err)
	}
	if err := create(fuse.Node()); err != nil {
		t.Fatal(err)
	}
	if calls := g.platform.Calls(); !slices.Contains(calls, "device c 10:229") {
		t.Errorf("calls %q", calls)
	}
	if err := g.remove("c", ""); err != nil {
		t.Fatal(err)
	}
	if err := create(other.Node()); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "mount /dev/x: device b 8:1") {
		t.Errorf("a device that there is not: %v", err)
	}
	for _, source := range []string{"/run/husk/dev/fuse", "/run/husk/dev/c10:229/x", "/run/husk/dev/p1:2"} {
		if err := create(source); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), source) {
			t.Errorf("%s: %v", source, err)
		}
	}
	if err := create("/run/husk/devices"); err != nil { // nothing of a failed one was left
		t.Error(err)
	}
}
