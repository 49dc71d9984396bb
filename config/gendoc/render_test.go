package main

import (
	"os"
	"strings"
	"testing"

	"github.com/husk-containers/husk"
)

func TestDocumentIsUpToDate(t *testing.T) {
	want, err := render(husk.Configuration)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/configuration.md is not what configuration.toml says: run go generate ./config")
	}
}

func TestRender(t *testing.T) {
	got, err := render("# All of it.\n\n# A table.\n[t]\n\n# A \"key\" of *.toml.\n# Two lines.\n# Allowed: \"x\" or \"y\"\nk = \"x\"\n")
	if err != nil {
		t.Fatal(err)
	}
	want := preamble + "\nAll of it.\n\n## [t]\n\nA table.\n\n### k\n\nA `\"key\"` of \\*.toml.\nTwo lines.\n\n- Default: `\"x\"`\n- Allowed: `\"x\"` or `\"y\"`\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestRenderRefuses(t *testing.T) {
	for _, tt := range []struct{ toml, want string }{
		{"[t]\n# No word on values.\nk = 1\n", "configuration.toml:3: no line"},
		{"[t]\nk=1\n", "configuration.toml:2: neither"},
	} {
		if _, err := render(tt.toml); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got error %v, want %q", tt.toml, err, tt.want)
		}
	}
}
