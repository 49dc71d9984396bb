package machine

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestArguments(t *testing.T) {
	for name, cfg := range map[string]Config{
		"plain":  {CPUs: 2, MemoryMiB: 4096},
		"outdir": {CPUs: 1, MemoryMiB: 1024, OutDir: "/somewhere"},
		"nodes":  {CPUs: 3, Nodes: 2, MemoryMiB: 1025},
	} {
		t.Run(name, func(t *testing.T) {
			got := strings.Join(arguments("/boot/vmlinuz-6.1", cfg), "\n") + "\n"
			golden := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("arguments differ (-want +got); -update writes them anew:\n%s", diff)
			}
		})
	}
}
