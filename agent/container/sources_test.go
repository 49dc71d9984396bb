package container

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestSourcesAreBeneathTheirVolume(t *testing.T) {
	volumes, bundle := filepath.Join(t.TempDir(), "volumes"), t.TempDir()
	volume := filepath.Join(volumes, "3")
	mountAt(t, volume)
	if err := os.MkdirAll(volume+"/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(volume+"/a/b/file", []byte("in the volume"), 0o600); err != nil {
		t.Fatal(err)
	}
	mountAt(t, volume+"/a/below")
	for link, to := range map[string]string{"within": "a/b", "absolute": "/etc", "up": "../../..", "circle": "circle"} {
		if err := os.Symlink(to, filepath.Join(volume, link)); err != nil {
			t.Fatal(err)
		}
	}
	spec := &specs.Spec{Mounts: []specs.Mount{
		{Destination: "/elsewhere", Source: "/etc"},
		{Destination: "/whole", Source: volume},
		{Destination: "/dir", Source: volume + "/a"},
		{Destination: "/file", Source: volume + "/a/b/file"},
		{Destination: "/link", Source: volume + "/within"},
	}}
	s, err := openSources(bundle+"/sources", volumes, spec)
	if err != nil {
		t.Fatal(err)
	}
	if spec.Mounts[0].Source != "/etc" || spec.Mounts[1].Source != volume || len(s) != 3 {
		t.Errorf("mounts %v, sources %q", spec.Mounts, s)
	}
	for i, file := range map[int]string{2: "/b/file", 3: "", 4: "/file"} {
		if data, err := os.ReadFile(spec.Mounts[i].Source + file); string(data) != "in the volume" {
			t.Errorf("%s: %q, %v", spec.Mounts[i].Destination, data, err)
		}
	}
	if !mounted(t, spec.Mounts[2].Source+"/below") {
		t.Error("what is mounted in the volume is not in the bind")
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(bundle + "/sources"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(volume + "/a/b/file"); err != nil { // it was not in there
		t.Error(err)
	}

	for source, is := range map[string]func(error) bool{
		"3/none": errdefs.IsNotFound, "3/a/b/file/x": errdefs.IsNotFound, "4/a": errdefs.IsNotFound,
		"3/absolute": errdefs.IsInvalidArgument, "3/up/etc": errdefs.IsInvalidArgument, "3/circle": errdefs.IsInvalidArgument,
	} {
		spec := &specs.Spec{Mounts: []specs.Mount{
			{Destination: "/good", Source: volume + "/a"},
			{Destination: "/bad", Source: filepath.Join(volumes, source)},
		}}
		if _, err := openSources(bundle+"/sources", volumes, spec); !is(err) {
			t.Errorf("%s: %v", source, err)
		}
		if mounted(t, bundle+"/sources/0") {
			t.Errorf("%s: the other source has stayed", source)
		}
	}
}
