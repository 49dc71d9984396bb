package podfiles

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestFilesOfAPod(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	dns := "nameserver 192.0.2.53\n"
	f, err := Make(dir, "web", &dns)
	if err != nil {
		t.Fatal(err)
	}
	sp := &specs.Spec{
		Root:   &specs.Root{Readonly: true},
		Mounts: []specs.Mount{{Destination: "/etc//hosts", Type: "bind", Source: "/mine"}},
	}
	f.AddTo(sp)
	want := map[string]string{"/etc/hostname": "web\n", "/etc/resolv.conf": dns}
	if len(sp.Mounts) != 3 || sp.Mounts[0].Source != "/mine" {
		t.Fatalf("mounts %+v", sp.Mounts)
	}
	for _, m := range sp.Mounts[1:] {
		if got, err := os.ReadFile(m.Source); err != nil || string(got) != want[m.Destination] || !slices.Contains(m.Options, "ro") {
			t.Errorf("%+v holds %q, %v; want %q, read-only", m, got, err, want[m.Destination])
		}
	}
	if _, err := Make(dir, "web", nil); err == nil {
		t.Error("files were made over others")
	}
	var none *Files
	none.AddTo(sp)
	if len(sp.Mounts) != 3 {
		t.Errorf("mounts %+v", sp.Mounts)
	}
}
