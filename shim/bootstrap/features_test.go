package bootstrap

import (
	"bytes"
	"slices"
	"testing"

	"github.com/containerd/containerd/api/types"
	_ "github.com/containerd/containerd/v2/core/runtime" // registers the type as containerd does
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
)

// What containerd 2.x asks of the features: whether recursive read-only mounts may be
// asked for, whether a mount may be id-mapped, whether a pod may have a user namespace.
func TestInfoTellsFeaturesAsContainerdDecodesThem(t *testing.T) {
	var out bytes.Buffer
	if err := (Program{Name: "io.containerd.husk.v2"}).printInfo(bytes.NewReader(nil), &out); err != nil {
		t.Fatal(err)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out.Bytes(), &info); err != nil {
		t.Fatal(err)
	}
	decoded, err := typeurl.UnmarshalAny(info.Features)
	if err != nil {
		t.Fatal(err)
	}
	f, ok := decoded.(*features.Features)
	if !ok {
		t.Fatalf("the features are a %T", decoded)
	}
	if !slices.Contains(f.MountOptions, "rro") {
		t.Errorf("no rro in the mount options %q", f.MountOptions)
	}
	for _, refused := range []string{"user", "time"} {
		if slices.Contains(f.Linux.Namespaces, refused) {
			t.Errorf("namespace %s, which is refused, is said to be known", refused)
		}
	}
	for _, unknown := range []string{"idmap", "ridmap"} {
		if slices.Contains(f.MountOptions, unknown) {
			t.Errorf("mount option %s, which is not heeded, is said to be known", unknown)
		}
	}
	for name, got := range map[string]*bool{
		"cgroup.v1": f.Linux.Cgroup.V1, "systemd": f.Linux.Cgroup.Systemd, "apparmor": f.Linux.Apparmor.Enabled,
		"selinux": f.Linux.Selinux.Enabled, "idmap": f.Linux.MountExtensions.IDMap.Enabled,
	} {
		if got == nil || *got {
			t.Errorf("%s is not said to be missing", name)
		}
	}
	for name, got := range map[string]*bool{"cgroup.v2": f.Linux.Cgroup.V2, "seccomp": f.Linux.Seccomp.Enabled} {
		if got == nil || !*got {
			t.Errorf("%s is not said to be there", name)
		}
	}
	if n := len(f.Linux.Capabilities); n < 41 {
		t.Errorf("%d capabilities, Linux 6.1 has 41", n)
	}
	if slices.Contains(f.Linux.Seccomp.Actions, "SCMP_ACT_NOTIFY") {
		t.Error("SCMP_ACT_NOTIFY, whose listener is refused, is said to be known")
	}
}
