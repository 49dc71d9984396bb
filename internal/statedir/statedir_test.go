package statedir

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
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
	if want := []Shim{{"k8s.io", "a", Sandbox(dir, "k8s.io", "a"), "/run/a"}, {"k8s.io", "b", Sandbox(dir, "k8s.io", "b"), "/run/b"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if got, err := Shims(filepath.Join(dir, "none"), "k8s.io"); err != nil || len(got) > 0 {
		t.Errorf("without a directory: %v, %v", got, err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"k8s.io+abc1", "k8s.io+abc2", "k8s.io+abc", "default+abd", "default+web", "k8s.io+web", "notours"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	invalid, missing := errdefs.IsInvalidArgument, errdefs.IsNotFound
	for _, tt := range []struct {
		namespace, id string
		want          string // namespace/id, or a part of the error
		class         func(error) bool
	}{
		{"", "abd", "default/abd", nil},
		{"k8s.io", "abc1", "k8s.io/abc1", nil},
		{"k8s.io", "abc", "k8s.io/abc", nil}, // whole, though others begin with it
		{"", "abc", "k8s.io/abc", nil},
		{"k8s.io", "w", "k8s.io/web", nil},
		{"", "ab", `pod "ab" could be each of default/abd, k8s.io/abc, k8s.io/abc1, k8s.io/abc2: give more`, invalid},
		{"", "web", "default/web, k8s.io/web", invalid},
		{"default", "abc1", `no pod "abc1" in namespace "default", but k8s.io/abc1: give its namespace by -n`, missing},
		{"default", "x", `no pod "x" in namespace "default", of 6 in ` + dir, missing},
		{"", "x", `no pod "x" in any namespace`, missing},
		{"", "", `no pod ""`, missing},
	} {
		got, err := Find(dir, tt.namespace, tt.id)
		switch {
		case tt.class == nil && (err != nil || got.Namespace+"/"+got.Sandbox != tt.want):
			t.Errorf("%s %s: got %+v, %v", tt.namespace, tt.id, got, err)
		case tt.class != nil && (!tt.class(err) || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s %s: got %v, want %q", tt.namespace, tt.id, err, tt.want)
		}
	}
}
