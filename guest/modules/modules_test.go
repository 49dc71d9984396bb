package modules

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// writeTree makes a module directory of the given files.
func writeTree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestResolve(t *testing.T) {
	tree, err := Open(writeTree(t, map[string]string{
		"modules.dep": `kernel/virtio/virtio.ko:
kernel/virtio/virtio_ring.ko.xz: kernel/virtio/virtio.ko
kernel/virtio/virtio_pci.ko: kernel/virtio/virtio_ring.ko.xz kernel/virtio/virtio.ko
kernel/fuse/fuse.ko.zst:
kernel/fuse/virtiofs.ko.zst: kernel/fuse/fuse.ko.zst kernel/virtio/virtio_ring.ko.xz kernel/virtio/virtio.ko
kernel/char/virtio-rng.ko: kernel/virtio/virtio.ko
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
kernel/broken.ko: kernel/gone.ko
`,
		"modules.builtin": "kernel/fs/overlayfs/overlay.ko\nkernel/drivers/tty/serial/8250/8250-pci.ko\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		names   []string
		want    []string
		wantErr string
	}{
		{name: "none"},
		{name: "no dependency", names: []string{"virtio"}, want: []string{"kernel/virtio/virtio.ko"}},
		{name: "dependencies first", names: []string{"virtiofs"}, want: []string{
			"kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko.xz", "kernel/fuse/fuse.ko.zst", "kernel/fuse/virtiofs.ko.zst",
		}},
		{name: "each once", names: []string{"virtio_pci", "virtio_rng", "virtio_pci"}, want: []string{
			"kernel/virtio/virtio.ko", "kernel/virtio/virtio_ring.ko.xz", "kernel/virtio/virtio_pci.ko", "kernel/char/virtio-rng.ko",
		}},
		{name: "dash for underscore", names: []string{"virtio-rng"}, want: []string{"kernel/virtio/virtio.ko", "kernel/char/virtio-rng.ko"}},
		{name: "built in", names: []string{"overlay", "8250_pci"}},
		{name: "circle ends", names: []string{"a"}, want: []string{"kernel/b.ko", "kernel/a.ko"}},
		{name: "unknown", names: []string{"virtio", "nonesuch"}, wantErr: "kernel module nonesuch: neither built in nor in "},
		{name: "unknown dependency", names: []string{"broken"}, wantErr: "broken depends on kernel module gone: neither"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tree.Resolve(tt.names...)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) || !errdefs.IsNotFound(err) {
					t.Fatalf("Resolve = %v, want a not-found error with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Resolve (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOpenRejects(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"no index", map[string]string{"modules.builtin": ""}, "modules.dep: no such file"},
		{"no list of built-in modules", map[string]string{"modules.dep": ""}, "modules.builtin: no such file"},
		{"line without colon", map[string]string{"modules.dep": "kernel/a.ko\n"}, "is not of the form"},
		{"file outside", map[string]string{"modules.dep": "../a.ko:\n"}, "is not of the form"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Open(writeTree(t, tt.files))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open = %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestRead(t *testing.T) {
	const module = "\x7fELF and so on"
	pack := func(open func(io.Writer) (io.WriteCloser, error)) string {
		var b bytes.Buffer
		w, err := open(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, module); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	tree, err := Open(writeTree(t, map[string]string{
		"modules.dep": "", "modules.builtin": "",
		"plain.ko":  module,
		"m.ko.gz":   pack(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }),
		"m.ko.xz":   pack(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }),
		"m.ko.zst":  pack(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }),
		"m.ko.lzo":  module,
		"bad.ko.gz": module, "bad.ko.xz": module, "bad.ko.zst": module,
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"plain.ko", "m.ko.gz", "m.ko.xz", "m.ko.zst"} {
		got, err := tree.Read(file)
		if err != nil || string(got) != module {
			t.Errorf("Read(%s) = %q, %v", file, got, err)
		}
	}
	for _, file := range []string{"m.ko.lzo", "bad.ko.gz", "bad.ko.xz", "bad.ko.zst", "none.ko"} {
		if _, err := tree.Read(file); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("Read(%s) = %v, want an error that names the file", file, err)
		}
	}
}

func TestNewest(t *testing.T) {
	dir := writeTree(t, map[string]string{
		"6.1.0-9-cloud-amd64/modules.dep":  "",
		"6.1.0-10-cloud-amd64/modules.dep": "",
		"6.1.0-11-cloud-amd64/modules.old": "", // removed, but for a leftover
		"6.12.0-1-amd64/modules.dep":       "",
	})
	for flavour, want := range map[string]string{"cloud": "6.1.0-10-cloud-amd64", "": "6.12.0-1-amd64"} {
		if got, err := Newest(dir, flavour); got != want || err != nil {
			t.Errorf("Newest(%q) = %q, %v, want %q", flavour, got, err, want)
		}
	}
	if _, err := Newest(dir, "rt"); !errdefs.IsNotFound(err) {
		t.Errorf("Newest(rt) = %v, want not found", err)
	}
}

func TestCompareReleases(t *testing.T) {
	// In ascending order.
	releases := []string{"", "5.10.0", "6.1", "6.1.0-9-cloud-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud-amd64", "6.1.176-1", "6.12.0"}
	for i, a := range releases {
		for j, b := range releases {
			if got := compareReleases(a, b); (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("compareReleases(%q, %q) = %d", a, b, got)
			}
		}
	}
}
