package statedir

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestShims(t *testing.T) {
	dir := t.TempDir()
	for _, s := range []struct{ namespace, id, address string }{
		{"k8s.io", "b", "/run/b"},
		{"k8s.io", "a", "/run/a"},
		{"k8s.io", "begins", ""},
		{"k8s", "c", "/run/c"}, // of another namespace, whose name begins alike
	} {
		sandbox := Sandbox(dir, s.namespace, s.id)
		if err := os.Mkdir(sandbox, 0o711); err != nil {
			t.Fatal(err)
		}
		if err := SetAddress(sandbox, s.address); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(Sandbox(dir, "k8s.io", "ends"), 0o711); err != nil {
		t.Fatal(err)
	}
	got, err := Shims(dir, "k8s.io")
	if want := []Shim{{"a", "/run/a"}, {"b", "/run/b"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if got, err := Shims(filepath.Join(dir, "none"), "k8s.io"); err != nil || len(got) > 0 {
		t.Errorf("without a directory: %v, %v", got, err)
	}
}
