package machine

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/test/rig/job"
)

// TestInitrdHoldsModulesInLoadOrder has the module that others need come first.
func TestInitrdHoldsModulesInLoadOrder(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"modules.builtin": "kernel/virtio_blk.ko\n",
		"modules.dep":     "virtio_pci.ko: virtio.ko\nvirtiofs.ko: virtio.ko\noverlay.ko:\nvirtio_console.ko: virtio.ko\nvirtio.ko:\n",
		"virtio.ko":       "", "virtio_pci.ko": "", "virtiofs.ko": "", "overlay.ko": "", "virtio_console.ko": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := initrdEntries(dir, []byte("program"), job.Job{Args: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := initrd.Write(&archive, entries...); err != nil {
		t.Fatal(err)
	}
	rest := archive.String()
	for _, name := range []string{
		"init\x00", `{"Args":["true"],`, "modules/00-virtio.ko", "modules/01-virtio_pci.ko", "modules/02-virtiofs.ko",
		"modules/03-overlay.ko", "modules/04-virtio_console.ko",
	} {
		_, after, ok := strings.Cut(rest, name)
		if !ok {
			t.Fatalf("initrd lacks %q after what comes before it", name)
		}
		rest = after
	}
}
