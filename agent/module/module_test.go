package module

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func packed(t *testing.T, content string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What loads for good is tested by the end-to-end tests, in guests.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if err := Load(dir, "fs-overlay"); !errdefs.IsNotFound(err) {
		t.Errorf("in an image without modules: %v", err)
	}
	write(t, dir, "index", "overlay , fs-overlay\nbroken ,\nmissing ,\nneeds missing, net-needs\n")
	write(t, dir, "overlay.ko.gz", packed(t, "this is no module"))
	write(t, dir, "broken.ko.gz", "this is not compressed")
	if err := Load(dir, "fs-nosuch"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"fs-nosuch"`) {
		t.Errorf("not in the image: %v", err)
	}
	for request, want := range map[string]string{
		"broken":    `load kernel module broken for "broken": gzip`,
		"net-needs": `load kernel module missing for "net-needs": open`,
	} {
		if err := Load(dir, request); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", request, err, want)
		}
	}
	err := Load(dir, "fs-overlay") // EPERM where this process may not load modules
	if err == nil || !strings.Contains(err.Error(), `load kernel module overlay for "fs-overlay": `) {
		t.Errorf("no module: %v", err)
	}
	t.Log(err)
}

func TestReadIsBounded(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "m.ko.gz", packed(t, strings.Repeat("x", maxSize+10)))
	image, err := read(filepath.Join(dir, "m.ko.gz"))
	if err != nil || len(image) > maxSize {
		t.Errorf("%d bytes, %v", len(image), err)
	}
}

func TestMainWantsAName(t *testing.T) {
	if err := Main(nil); err == nil {
		t.Error("no error")
	}
}
