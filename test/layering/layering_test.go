// Package layering holds the rules of the source tree as tests: who may import
// whom, what the agent may weigh, what every package says of itself.
package layering

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/husk-containers/husk"

// A pkg is what `go list` tells of a package.
type pkg struct {
	ImportPath string
	Dir        string
	CgoFiles   []string
	Imports    []string
}

// list runs go list without cgo, as Husk's programs are built.
func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,CgoFiles,Imports"}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v", strings.Join(args, " "), err)
	}
	var packages []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// layers say for each package of ours, by a pattern of its path below the
// module, which others of ours it may import directly. A package matches the
// first that fits. The programs' wiring is in cmd; test, guest and the
// generators below other packages are no part of a running Husk.
var layers = []struct{ pkg, may string }{
	{`cmd/containerd-shim-husk-v2`, `shim(/.*)?|virtcontainers(/dialer|/cgroup|/resource)?|config|hypervisor|hypervisor/qemu|internal/.*`},
	{`cmd/husk`, `config|hypervisor|hypervisor/.*|internal/.*`},
	{`cmd/husk-agent`, `agent(/.*)?|protocols/.*|internal/.*`},
	{`shim(/.*)?`, `shim/.*|virtcontainers|internal/.*`},
	{`virtcontainers(/.*)?`, `virtcontainers/.*|hypervisor|protocols/.*|config|internal/.*`},
	{`hypervisor(/.*)?`, `hypervisor(/.*)?|internal/.*`},
	{`agent(/.*)?`, `agent/.*|protocols/.*|internal/.*`},
	{`protocols/.*`, ``},
	{`config`, `|internal/.*`},
	{`config/gendoc`, `|config`},
	{`internal/check`, `config|hypervisor|hypervisor/virtiofs|virtcontainers/usernet|internal/.*`},
	{`internal/operator`, `shim/operator/v1|internal/.*`},
	{`internal/status`, `shim/operator/v1|virtcontainers/record|internal/.*`},
	{`internal/.*`, `internal/.*`},
	{`guest/.*`, `guest/.*|internal/.*`},
	{`test/.*`, `test/.*|guest/.*|internal/.*`},
	{``, ``},
}

// wired are packages that choose among implementations: only programs may import
// them, and the packages below themselves.
var wired = []string{"hypervisor/qemu", "internal/check"}

func TestImportsFollowTheLayers(t *testing.T) {
	for _, p := range list(t, "./...") {
		name := below(p.ImportPath)
		i := slices.IndexFunc(layers, func(l struct{ pkg, may string }) bool { return matches(l.pkg, name) })
		if i < 0 {
			t.Errorf("package %q is in no layer", name)
			continue
		}
		for _, imported := range p.Imports {
			// The module's root embeds configuration.toml, for config and its generator.
			if !ours(imported) || below(imported) == "" && strings.HasPrefix(name, "config") {
				continue
			}
			if slices.Contains(wired, below(imported)) && !strings.HasPrefix(name, "cmd/") {
				t.Errorf("%s imports %s, which only programs may", name, below(imported))
			}
			if !matches(layers[i].may, below(imported)) {
				t.Errorf("%s imports %s, and may import of ours only %q", name, below(imported), layers[i].may)
			}
		}
	}
}

// TestAgentStaysSmall holds what must never reach the guest, whichever way.
func TestAgentStaysSmall(t *testing.T) {
	const (
		maxBytes    = 12 << 20
		maxPackages = 220 // of them about 130 are the standard library's
	)
	forbidden := regexp.MustCompile(`^(` + module + `/(shim|virtcontainers|hypervisor|config)|github\.com/containerd/containerd/(v2|api)|` +
		`github\.com/prometheus|google\.golang\.org/grpc|runtime/cgo)(/.*)?$`)
	// ttrpc and errdefs speak of errors in gRPC's terms. Nothing else of it may come.
	statuses := regexp.MustCompile(`^google\.golang\.org/grpc/(codes|connectivity|grpclog|grpclog/internal|internal|internal/status|serviceconfig|status)$`)
	packages := list(t, "-deps", "./cmd/husk-agent")
	for _, p := range packages {
		if forbidden.MatchString(p.ImportPath) && !statuses.MatchString(p.ImportPath) {
			t.Errorf("the agent depends on %s", p.ImportPath)
		}
		if len(p.CgoFiles) > 0 {
			t.Errorf("the agent depends on %s, which uses cgo", p.ImportPath)
		}
	}
	if len(packages) > maxPackages {
		t.Errorf("the agent is made of %d packages, want at most %d", len(packages), maxPackages)
	}
	binary := filepath.Join(t.TempDir(), "husk-agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, module+"/cmd/husk-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > maxBytes {
		t.Errorf("the agent has %d bytes, want at most %d", info.Size(), maxBytes)
	}
	t.Logf("agent: %d packages, %d bytes", len(packages), info.Size())
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	comment := regexp.MustCompile(`(?m)^// (Package|Command) [\w-]+ `)
	for _, p := range list(t, "./...") {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		said := slices.ContainsFunc(files, func(file string) bool {
			data, err := os.ReadFile(file)
			return err == nil && comment.Match(data)
		})
		if !said {
			t.Errorf("%s has no package comment", below(p.ImportPath))
		}
	}
}

// TestSizes keeps files and packages such that one can be read at a sitting.
func TestSizes(t *testing.T) {
	const (
		maxFile     = 500
		maxTestFile = 800
		maxPackage  = 1500
	)
	generated := regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)
	for _, p := range list(t, "./...") {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if generated.Match(data) {
				continue
			}
			n, most := strings.Count(string(data), "\n"), maxFile
			if strings.HasSuffix(file, "_test.go") {
				most = maxTestFile
			} else {
				total += n
			}
			if n > most {
				t.Errorf("%s/%s has %d lines, want at most %d", below(p.ImportPath), filepath.Base(file), n, most)
			}
		}
		if total > maxPackage {
			t.Errorf("package %s has %d lines, want at most %d", below(p.ImportPath), total, maxPackage)
		}
	}
}

// unwanted are names of packages that say nothing.
var unwanted = []string{"pkg", "util", "utils", "common", "helper", "helpers", "types", "misc"}

func TestPackagesAreNamedByNouns(t *testing.T) {
	for _, p := range list(t, "./...") {
		for _, element := range strings.Split(below(p.ImportPath), "/") {
			if slices.Contains(unwanted, element) {
				t.Errorf("package %s: %q says nothing", below(p.ImportPath), element)
			}
		}
	}
}

func ours(path string) bool { return path == module || strings.HasPrefix(path, module+"/") }

// below is a package's path below the module; "" is the module's root.
func below(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

func matches(pattern, path string) bool {
	return regexp.MustCompile(`^(?:` + pattern + `)$`).MatchString(path)
}
