package virtiofs

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

func TestParseVersion(t *testing.T) {
	for name, tt := range map[string]struct {
		output string
		want   Version
		err    string
	}{
		"C of Debian 12": {
			"virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022\nusing FUSE kernel interface version 7.36\n",
			Version{C, "7.2.22"},
			"",
		},
		"C of QEMU 5.2":     {"virtiofsd version 5.2.0\n", Version{C, "5.2.0"}, ""},
		"Rust of Debian 13": {"virtiofsd 1.13.2\n", Version{Rust, "1.13.2"}, ""},
		"Rust, development": {"virtiofsd 2.0.0-dev", Version{Rust, "2.0.0-dev"}, ""},
		"oldest Rust":       {"virtiofsd 1.5.0", Version{Rust, "1.5.0"}, ""},
		"too old Rust":      {"virtiofsd 1.4.9", Version{}, "1.4.9 is too old: 1.5 or later"},
		"before the first":  {"virtiofsd 0.9.1", Version{}, "0.9.1 is too old"},
		"another program":   {"grep (GNU grep) 3.8\nmore\n", Version{}, `"grep (GNU grep) 3.8" is no version of virtiofsd`},
		"nothing":           {"", Version{}, `"" is no version`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseVersion(tt.output)
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("parseVersion = %+v, %v; want %+v, %q", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestArgs(t *testing.T) {
	for name, p := range map[string]params{
		"default":     {fd: 3, dir: "/run/husk/a/share", cache: CacheAuto, nofile: 524288},
		"never":       {fd: 3, dir: "/share", cache: CacheNever, nofile: 20000, threadPoolSize: 4},
		"odd-dir":     {fd: 7, dir: `/a,xattr\b c`, cache: CacheAlways, nofile: 1024},
		"dashed-name": {fd: 3, dir: "/--fd=9", cache: CacheAuto, nofile: 1024},
	} {
		for _, d := range []Dialect{C, Rust} {
			t.Run(name+"/"+d.String(), func(t *testing.T) {
				got := strings.Join(d.args(p), "\n") + "\n"
				golden := filepath.Join("testdata", "args-"+name+"-"+d.String())
				if *update {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if got != string(want) {
					t.Errorf("args:\n%swant:\n%s", got, want)
				}
			})
		}
	}
}

func TestEnv(t *testing.T) {
	if got := C.env(""); !slices.Equal(got, []string{"MALLOC_ARENA_MAX=8"}) {
		t.Errorf("C's environment is %q", got)
	}
	if got := C.env("/lib/a.so"); !slices.Equal(got, []string{"MALLOC_ARENA_MAX=8", "LD_PRELOAD=/lib/a.so"}) {
		t.Errorf("C's environment is %q", got)
	}
	if got := Rust.env("/lib/a.so"); len(got) > 0 {
		t.Errorf("Rust's environment is %q", got)
	}
}

func TestFindPreload(t *testing.T) {
	for name, tt := range map[string]struct {
		prefix string
		there  bool
		err    string
	}{
		"there":            {"prefix", true, ""},
		"missing":          {"prefix", false, "no such file or directory: a pod that creates"},
		"not for a linker": {"a prefix", true, "no path with a colon or a space"},
	} {
		t.Run(name, func(t *testing.T) {
			prefix := filepath.Join(t.TempDir(), tt.prefix)
			want := filepath.Join(prefix, "lib/husk/virtiofsd-preload.so")
			if err := os.MkdirAll(filepath.Dir(want), 0o755); err != nil {
				t.Fatal(err)
			}
			if tt.there {
				if err := os.WriteFile(want, nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := findPreload(filepath.Join(prefix, "bin/program"))
			if tt.err == "" && (got != want || err != nil) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%q, %v, want %q", got, err, want)
			}
		})
	}
}
