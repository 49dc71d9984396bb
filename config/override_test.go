package config

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// Each annotation: a good value is applied, and each bad one is refused by its name.
func TestOverride(t *testing.T) {
	set := func(change func(*Config)) Config {
		c := Default()
		c.Guest.KernelParams = "quiet"
		c.Runtime.AllowedAnnotations = []string{"io.husk.*"}
		change(&c)
		return c
	}
	tests := map[string]struct {
		good string
		want Config
		bad  []string
	}{
		"io.husk.default_vcpus":       {"4", set(func(c *Config) { c.Hypervisor.DefaultVCPUs = 4 }), []string{"0", "-1", "256", "1.5", "", "two", " 2", "99999999999999999999"}},
		"io.husk.default_memory_mib":  {"512", set(func(c *Config) { c.Hypervisor.DefaultMemoryMiB = 512 }), []string{"127", "1048577", "512M", "0"}},
		"io.husk.max_vcpus":           {"2", set(func(c *Config) { c.Hypervisor.MaxVCPUs = 2 }), []string{"-1", "256", ""}},
		"io.husk.max_memory_mib":      {"1024", set(func(c *Config) { c.Hypervisor.MaxMemoryMiB = 1024 }), []string{"-1", "255", "1g"}},
		"io.husk.free_page_reporting": {"false", set(func(c *Config) { c.Hypervisor.FreePageReporting = false }), []string{"", "no", "2"}},
		"io.husk.vcpu_pinning":        {"true", set(func(c *Config) { c.Hypervisor.VCPUPinning = true }), []string{"", "yes", "1", "True"}},
		"io.husk.virtiofsd_cache":     {"never", set(func(c *Config) { c.Hypervisor.VirtiofsdCache = VirtiofsdCacheNever }), []string{"", "Never", "none"}},
		"io.husk.virtiofsd_threads":   {"8", set(func(c *Config) { c.Hypervisor.VirtiofsdThreads = 8 }), []string{"-1", "65", ""}},
		"io.husk.kernel_params": {
			"a=1 b", set(func(c *Config) { c.Guest.KernelParams = "quiet a=1 b" }),
			[]string{"husk.log=debug", "a\nb", strings.Repeat("x", 1020)},
		},
		"io.husk.boot_timeout": {"2m", set(func(c *Config) { c.Runtime.BootTimeout = Duration{2 * time.Minute} }), []string{"", "60", "2h", "99ms", "-1s"}},
	}
	var tested []string
	before := set(func(*Config) {})
	for name, tt := range tests {
		tested = append(tested, name)
		got, err := before.Override(map[string]string{name: tt.good, "other.io/x": "y", "io.huskier": "z"})
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
		for _, bad := range tt.bad {
			got, err := before.Override(map[string]string{name: bad})
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name+" = ") || !strings.Contains(err.Error(), ": want ") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s = %q: %v", name, bad, err)
			}
			if !cmp.Equal(got, Config{}) {
				t.Errorf("%s = %q: a configuration beside the error", name, bad)
			}
		}
		none := before
		none.Runtime.AllowedAnnotations = nil
		if _, err := none.Override(map[string]string{name: tt.good}); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "runtime.allowed_annotations") {
			t.Errorf("%s where none is allowed: %v", name, err)
		}
	}
	slices.Sort(tested)
	names := annotationNames()
	slices.Sort(names)
	if diff := cmp.Diff(names, tested); diff != "" {
		t.Errorf("annotations and those of this test (-all +tested):\n%s", diff)
	}
	if c := slices.Compact(names); len(c) != len(overrides()) {
		t.Error("two keys have one annotation")
	}
}

func TestOverrideNamesAllThatIsWrong(t *testing.T) {
	c := Default()
	c.Runtime.AllowedAnnotations = []string{"io.husk.default_*"}
	_, err := c.Override(map[string]string{
		"io.husk.path": "/bin/sh", "io.husk.default_vcpus": "0", "io.husk.default_memory_mib": "512", "io.husk.vcpu_pinning": "true", "io.husk.": "",
	})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("%v, want InvalidArgument", err)
	}
	for _, want := range []string{
		"io.husk.path: there is no such annotation", "io.husk.: there is no such annotation",
		`io.husk.default_vcpus = "0": want a whole number from 1 to 255`,
		"io.husk.vcpu_pinning: this node does not allow it",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "io.husk.default_memory_mib =") {
		t.Errorf("%v names what is right", err)
	}
}

// What the node's operator has bounded, no pod unbounds.
func TestOverrideKeepsTheMaxima(t *testing.T) {
	c := Default()
	c.Hypervisor.MaxVCPUs, c.Hypervisor.MaxMemoryMiB = 4, 1024
	c.Runtime.AllowedAnnotations = []string{"io.husk.*"}
	for name, tt := range map[string]struct {
		annotations map[string]string
		want        string // part of the error; empty: none
	}{
		"lowered":                {map[string]string{"io.husk.max_vcpus": "2", "io.husk.max_memory_mib": "512"}, ""},
		"the same":               {map[string]string{"io.husk.max_vcpus": "4"}, ""},
		"raised":                 {map[string]string{"io.husk.max_vcpus": "5"}, `io.husk.max_vcpus = "5": want at most 4, for hypervisor.max_vcpus bounds it`},
		"taken away":             {map[string]string{"io.husk.max_memory_mib": "0"}, `want at most 1024, `},
		"a default at it":        {map[string]string{"io.husk.default_vcpus": "4"}, ""},
		"a default above":        {map[string]string{"io.husk.default_memory_mib": "1025"}, `io.husk.default_memory_mib = "1025": want at most 1024`},
		"a default above both":   {map[string]string{"io.husk.max_vcpus": "2", "io.husk.default_vcpus": "3"}, `io.husk.default_vcpus = "3": want at most 2`},
		"lower than the default": {map[string]string{"io.husk.max_memory_mib": "128"}, `io.husk.max_memory_mib = "128": want 0, or a whole number from default_memory_mib to`},
	} {
		_, err := c.Override(tt.annotations)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
