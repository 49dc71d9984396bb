package files

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/husk-containers/husk/agent/archive"
)

func seeds(f *testing.F) {
	f.Helper()
	for _, entries := range [][]byte{seed(f, "."), seed(f, "../x"), seed(f, "/x")} {
		f.Add(entries)
	}
}

func seed(f *testing.F, name string) []byte {
	f.Helper()
	var b bytes.Buffer
	if err := archiveOf(&b, dirEntry("."), linkEntry("l", ".."), hardEntry("h", "../canary"), dirEntry("d"), fileEntry("d/x", "x"), fileEntry(name, "y")); err != nil {
		f.Fatal(err)
	}
	return b.Bytes()
}

// canary makes a directory and something beside it that nothing may change.
func canary(t *testing.T) (dir string, unharmed func()) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "in")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(filepath.Dir(dir), "canary")
	if err := os.WriteFile(path, []byte("alive"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		if b, err := os.ReadFile(path); string(b) != "alive" || err != nil {
			t.Errorf("the canary is %q, %v", b, err)
		}
		if entries, err := os.ReadDir(filepath.Dir(dir)); len(entries) != 2 || err != nil {
			t.Errorf("beside it are %v, %v", entries, err)
		}
	}
}

// FuzzSync takes any archive: it changes the copy alone, and leaves nothing staged.
func FuzzSync(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		dir, unharmed := canary(t)
		c := newCopies(dir)
		for range 2 {
			c.sync(t.Context(), dir+"/t", bytes.NewReader(sent)) //nolint:errcheck // most are nonsense
		}
		unharmed()
		if entries, err := os.ReadDir(filepath.Join(dir, stageDir)); len(entries) > 0 || err != nil {
			t.Errorf("staged: %v, %v", entries, err)
		}
	})
}

// FuzzExtract takes any archive: what it makes is in the directory.
func FuzzExtract(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		dir, unharmed := canary(t)
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		archive.Extract(root, bytes.NewReader(sent)) //nolint:errcheck // most are nonsense
		unharmed()
	})
}
