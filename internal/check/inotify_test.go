package check

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInotify(t *testing.T) {
	for content, want := range map[string]Level{"128\n": Warn, "255\n": Warn, "256\n": OK, "8192\n": OK, "many\n": Warn} {
		path := filepath.Join(t.TempDir(), "max_user_instances")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := inotify(path); r.Level != want {
			t.Errorf("%q: %v", content, r)
		}
	}
	r := inotify(filepath.Join(t.TempDir(), "missing"))
	if r.Level != Warn || !strings.Contains(r.Text, "missing") {
		t.Errorf("without the file: %v", r)
	}
}
