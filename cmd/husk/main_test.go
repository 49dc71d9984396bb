package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/internal/version"
)

func TestUsage(t *testing.T) {
	for _, tt := range []struct {
		args           string
		status         int
		stdout, stderr string // parts; empty where nothing is printed
	}{
		{"", exitUsage, "", "Usage:"},
		{"help", exitOK, "Usage:", ""},
		{"--help", exitOK, "Usage:", ""},
		{"check -h", exitOK, "Usage:", ""},
		{"start", exitUsage, "", `unknown command "start"`},
		{"-v", exitUsage, "", `unknown command "-v"`},
		{"check now", exitUsage, "", `check: unexpected argument "now"`},
		{"check -config", exitUsage, "", "flag needs an argument"},
		{"cp -h", exitOK, "husk cp [-n NAMESPACE]", ""},
		{"cp a", exitUsage, "", "cp: 1 arguments, want 2"},
		{"cp a b c", exitUsage, "", `cp: unexpected argument "c"`},
		{"cp a b", exitFailed, "", `neither "a" nor "b" is CONTAINER:PATH`},
		{"cp -config /nonexistent/husk.toml c:a b", exitFailed, "", "/nonexistent/husk.toml"},
		{"cp -max-entries many c:a b", exitUsage, "", "invalid value"},
		{"status -h", exitOK, "husk status [-n NAMESPACE] [-json]", ""},
		{"status a b", exitUsage, "", `status: unexpected argument "b"`},
		{"status a --json", exitUsage, "", `status: unexpected argument "--json": flags come first`},
		{"status -config /nonexistent/husk.toml", exitFailed, "", "/nonexistent/husk.toml"},
		{"reclaim -h", exitOK, "husk reclaim [-n NAMESPACE] [-config FILE] POD", ""},
		{"pause -h", exitOK, "husk pause [-n NAMESPACE] [-config FILE] POD", ""},
		{"resume -h", exitOK, "husk resume [-n NAMESPACE] [-config FILE] POD", ""},
		{"reclaim", exitUsage, "", "reclaim: 0 arguments, want 1"},
		{"pause", exitUsage, "", "pause: 0 arguments, want 1"},
		{"resume a b", exitUsage, "", `resume: unexpected argument "b"`},
		{"pause -config /nonexistent/husk.toml a", exitFailed, "", "/nonexistent/husk.toml"},
		{"version -yaml", exitUsage, "", "flag provided but not defined: -yaml"},
		{"version", exitOK, "husk " + version.Get().String() + "\n", ""},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var stdout, stderr strings.Builder
			if status := run(strings.Fields(tt.args), &stdout, &stderr); status != tt.status {
				t.Errorf("status %d, want %d", status, tt.status)
			}
			for _, out := range []struct{ name, got, want string }{{"stdout", stdout.String(), tt.stdout}, {"stderr", stderr.String(), tt.stderr}} {
				if !strings.Contains(out.got, out.want) || out.want == "" && out.got != "" {
					t.Errorf("%s is %q, want %q", out.name, out.got, out.want)
				}
			}
		})
	}
}

func TestVersionJSON(t *testing.T) {
	var stdout, stderr strings.Builder
	if status := run([]string{"version", "-json"}, &stdout, &stderr); status != exitOK {
		t.Fatalf("status %d: %s", status, stderr.String())
	}
	var got version.Version
	if err := json.Unmarshal([]byte(stdout.String()), &got); err != nil || got != version.Get() {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestCheckExitsByResult(t *testing.T) {
	path := filepath.Join(t.TempDir(), "husk.toml")
	if err := os.WriteFile(path, []byte("[guest]\nkernel = \"/nonexistent/kernel\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := "ok    config      " + path + "\n"
	t.Setenv(config.EnvPath, "/nonexistent/husk.toml")
	var stdout, stderr strings.Builder
	if status := run([]string{"check", "-config", path}, &stdout, &stderr); status != exitFailed {
		t.Errorf("status %d: %s", status, stderr.String())
	}
	if got := stdout.String(); !strings.HasPrefix(got, want) || !strings.Contains(got, `FAIL  kernel      kernel "/nonexistent/kernel": no such file`) {
		t.Errorf("got %s", got)
	}
}

func TestPodsAreRoots(t *testing.T) {
	if err := needRoot(1000); err == nil || !strings.Contains(err.Error(), "run this as root") {
		t.Errorf("got %v", err)
	}
	if err := needRoot(0); err != nil {
		t.Error(err)
	}
}
