package config

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/husk-containers/husk"
)

// write makes a file below a fresh or given directory.
func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, content string) (path string, c Config, err error) {
	t.Helper()
	path = write(t, filepath.Join(t.TempDir(), "husk.toml"), content)
	c, err = Load(path, true)
	return path, c, err
}

// structKeys lists section.key of the whole tree of types, in its order.
func structKeys() []string {
	var keys []string
	for _, section := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		for _, f := range reflect.VisibleFields(section.Type) {
			keys = append(keys, section.Tag.Get("toml")+"."+f.Tag.Get("toml"))
		}
	}
	return keys
}

func TestAnnotatedFileIsTheDefault(t *testing.T) {
	_, got, err := load(t, husk.Configuration)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("configuration.toml is not Default() (-default +file):\n%s", diff)
	}
}

func TestDefaultIsValid(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Error(err)
	}
}

func TestFileRulesAndTypesHaveTheSameKeys(t *testing.T) {
	want := structKeys()
	var ruled []string
	for _, r := range rules() {
		ruled = append(ruled, r.key)
	}
	if diff := cmp.Diff(want, ruled); diff != "" {
		t.Errorf("keys of the types and of the rules (-types +rules):\n%s", diff)
	}
	var tree map[string]map[string]any
	if err := toml.Unmarshal([]byte(husk.Configuration), &tree); err != nil {
		t.Fatal(err)
	}
	var written []string
	for section, keys := range tree {
		for key := range keys {
			written = append(written, section+"."+key)
		}
	}
	slices.Sort(want)
	slices.Sort(written)
	if diff := cmp.Diff(want, written); diff != "" {
		t.Errorf("keys of the types and of configuration.toml (-types +file):\n%s", diff)
	}
}

func TestAnnotatedFileSaysWhatIsAllowed(t *testing.T) {
	section, allowed := "", ""
	said := make(map[string]string)
	for line := range strings.Lines(husk.Configuration) {
		line = strings.TrimSpace(line)
		if s, ok := strings.CutPrefix(line, "# Allowed: "); ok {
			allowed = s
		} else if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
		} else if key, _, ok := strings.Cut(line, " = "); ok {
			said[section+"."+key], allowed = allowed, ""
		}
	}
	for _, r := range rules() {
		if said[r.key] != r.want {
			t.Errorf("%s: configuration.toml allows %q, the rule %q", r.key, said[r.key], r.want)
		}
	}
}

// Each key: a good value is applied and each bad one is refused with its line.
func TestKeys(t *testing.T) {
	long := `"` + strings.Repeat("x", 1025) + `"`
	badPaths := []string{`"relative"`, `"a/b"`, `"/nul\u0000"`, `3`, `true`, `["/a"]`}
	badTimes := []string{`"60"`, `"ten seconds"`, `60`, `1.5`, `"99ms"`, `"1h1s"`, `"-5s"`, `"0s"`, `""`, `{ Duration = 5 }`}
	tests := []struct {
		key, good string
		get       func(Config) any
		want      any
		bad       []string
	}{
		{"hypervisor.path", `"/opt/qemu"`, func(c Config) any { return c.Hypervisor.Path }, "/opt/qemu", append(badPaths, `""`)},
		{"hypervisor.accelerator", `"kvm"`, func(c Config) any { return c.Hypervisor.Accelerator }, AcceleratorKVM, []string{`"KVM"`, `""`, `"xen"`, `1`}},
		{"hypervisor.machine", `"q35"`, func(c Config) any { return c.Hypervisor.Machine }, "q35", []string{`"microvm"`, `""`, `35`}},
		{"hypervisor.cpu_model", `"EPYC-v4,-svm,+x2apic"`, func(c Config) any { return c.Hypervisor.CPUModel }, "EPYC-v4,-svm,+x2apic", []string{`"a b"`, `"a\nb"`, `1`}},
		{"hypervisor.default_vcpus", `255`, func(c Config) any { return c.Hypervisor.DefaultVCPUs }, 255, []string{`0`, `-1`, `256`, `1.5`, `"2"`, `9223372036854775807`}},
		{"hypervisor.default_memory_mib", `128`, func(c Config) any { return c.Hypervisor.DefaultMemoryMiB }, 128, []string{`127`, `1048577`, `"256"`, `"256M"`, `256.0`}},
		{"hypervisor.max_vcpus", `16`, func(c Config) any { return c.Hypervisor.MaxVCPUs }, 16, []string{`-1`, `256`, `1.5`, `"2"`, `true`}},
		{"hypervisor.max_memory_mib", `256`, func(c Config) any { return c.Hypervisor.MaxMemoryMiB }, 256, []string{`255`, `-1`, `1048577`, `"512"`}},
		{"hypervisor.free_page_reporting", `false`, func(c Config) any { return c.Hypervisor.FreePageReporting }, false, []string{`0`, `"true"`, `"on"`, `[]`}},
		{"hypervisor.vcpu_pinning", `true`, func(c Config) any { return c.Hypervisor.VCPUPinning }, true, []string{`1`, `"yes"`}},
		{
			"hypervisor.channels", `["virtio-serial"]`, func(c Config) any { return c.Hypervisor.Channels },
			[]Channel{ChannelVirtioSerial},
			[]string{`[]`, `["vsock"]`, `["virtio-serial", "virtio-serial"]`, `"vhost-vsock"`, `[1]`, `[""]`},
		},
		{"hypervisor.user", `"65534"`, func(c Config) any { return c.Hypervisor.User }, "65534", []string{`"root"`, `"0"`, `"00"`, `"a b"`, `"a:b"`, `"-a"`, `0`, `65534`}},
		{"hypervisor.virtiofsd", `"/opt/virtiofsd"`, func(c Config) any { return c.Hypervisor.Virtiofsd }, "/opt/virtiofsd", badPaths},
		{"hypervisor.virtiofsd_cache", `"never"`, func(c Config) any { return c.Hypervisor.VirtiofsdCache }, VirtiofsdCacheNever, []string{`"none"`, `""`, `false`}},
		{"hypervisor.virtiofsd_threads", `64`, func(c Config) any { return c.Hypervisor.VirtiofsdThreads }, 64, []string{`-1`, `65`, `0.5`, `"4"`, `true`}},
		{"guest.kernel", `"/boot/vmlinuz"`, func(c Config) any { return c.Guest.Kernel }, "/boot/vmlinuz", append(badPaths, `""`)},
		{"guest.initrd", `"/boot/initrd"`, func(c Config) any { return c.Guest.Initrd }, "/boot/initrd", append(badPaths, `""`)},
		{"guest.kernel_params", `"mitigations=off a=\"b c\""`, func(c Config) any { return c.Guest.KernelParams }, `mitigations=off a="b c"`, []string{`"a\nb"`, `"é"`, `"quiet husk.channel=vsock:1"`, long, `["quiet"]`}},
		{"guest.log_level", `"debug"`, func(c Config) any { return c.Guest.LogLevel }, LogLevelDebug, []string{`"error"`, `"trace"`, `"WARN"`, `""`, `1`}},
		{"network.host_network", `"refuse"`, func(c Config) any { return c.Network.HostNetwork }, HostNetworkRefuse, []string{`"none"`, `"User"`, `""`, `true`}},
		{"network.unconfigured_network", `"user"`, func(c Config) any { return c.Network.UnconfiguredNetwork }, UnconfiguredNetworkUser, []string{`"refuse"`, `""`, `false`}},
		{"network.vhost_net", `"never"`, func(c Config) any { return c.Network.VhostNet }, VhostNetNever, []string{`"always"`, `""`, `true`}},
		{"network.port_forward", `false`, func(c Config) any { return c.Network.PortForward }, false, []string{`"false"`, `0`, `""`, `[true]`}},
		{"network.passt", `"/opt/passt"`, func(c Config) any { return c.Network.Passt }, "/opt/passt", badPaths},
		{"runtime.state_dir", `"/var/run/husk"`, func(c Config) any { return c.Runtime.StateDir }, "/var/run/husk", append(badPaths, `""`)},
		{"runtime.log_level", `"error"`, func(c Config) any { return c.Runtime.LogLevel }, LogLevelError, []string{`"fatal"`, `""`, `0`}},
		{"runtime.boot_timeout", `"2m"`, func(c Config) any { return c.Runtime.BootTimeout.Duration }, 2 * time.Minute, badTimes},
		{"runtime.request_timeout", `"1h"`, func(c Config) any { return c.Runtime.RequestTimeout.Duration }, time.Hour, badTimes},
		{"runtime.stop_timeout", `"100ms"`, func(c Config) any { return c.Runtime.StopTimeout.Duration }, 100 * time.Millisecond, badTimes},
		{"runtime.drain_timeout", `"1m30s"`, func(c Config) any { return c.Runtime.DrainTimeout.Duration }, 90 * time.Second, badTimes},
		{
			"runtime.allowed_sockets", `["/run/spire/*/agent.sock", "/var/lib/kubelet/**"]`, func(c Config) any { return c.Runtime.AllowedSockets },
			[]string{"/run/spire/*/agent.sock", "/var/lib/kubelet/**"},
			[]string{`"/**"`, `["run/x"]`, `["/a", ""]`, `["/"]`, `["/a/../b"]`, `["/a/"]`, `["/a["]`, `["/[a/b]"]`, `[1]`, `true`, `["/nul\u0000"]`},
		},
		{
			"runtime.allowed_annotations", `["io.husk.default_*", "io.husk.boot_timeout"]`, func(c Config) any { return c.Runtime.AllowedAnnotations },
			[]string{"io.husk.default_*", "io.husk.boot_timeout"},
			[]string{`"io.husk.*"`, `["default_vcpus"]`, `["io.husk.kernel"]`, `["io.husk.allowed_*"]`, `["io.husk.[a"]`, `[""]`, `[1]`, `true`},
		},
	}
	var tested []string
	for i, tt := range tests {
		tested = append(tested, tt.key)
		section, key, _ := strings.Cut(tt.key, ".")
		t.Run(tt.key, func(t *testing.T) {
			_, c, err := load(t, "["+section+"]\n"+key+" = "+tt.good+"\n")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, tt.get(c)); diff != "" {
				t.Errorf("%s = %s (-want +got):\n%s", tt.key, tt.good, diff)
			}
			for _, bad := range tt.bad {
				path, _, err := load(t, "# A comment.\n["+section+"]\n\n"+key+" = "+bad+" # so\n")
				if err == nil {
					t.Errorf("%s = %s is accepted", tt.key, bad)
					continue
				}
				msg := err.Error()
				if !strings.HasPrefix(msg, path+":4: "+tt.key+" = ") || !strings.HasSuffix(msg, "want "+rules()[i].want) || strings.Contains(msg, "\n") {
					t.Errorf("%s = %s is refused by %q", tt.key, bad, msg)
				}
			}
		})
	}
	if diff := cmp.Diff(structKeys(), tested); diff != "" {
		t.Errorf("keys of the types and of this test (-types +tested):\n%s", diff)
	}
}

// No pattern at all is not the same as none given.
func TestNoSocketIsAllowed(t *testing.T) {
	_, c, err := load(t, "[runtime]\nallowed_sockets = []\n")
	if err != nil || len(c.Runtime.AllowedSockets) != 0 {
		t.Errorf("%q, %v", c.Runtime.AllowedSockets, err)
	}
}

func TestAMaximumBoundsTheDefault(t *testing.T) {
	_, _, err := load(t, "[hypervisor]\nmax_vcpus = 2\ndefault_vcpus = 3\n")
	if err == nil || !strings.Contains(err.Error(), ":2: hypervisor.max_vcpus = 2: want 0, or a whole number from default_vcpus to 255") {
		t.Errorf("%v", err)
	}
	if _, _, err := load(t, "[hypervisor]\nmax_vcpus = 3\ndefault_vcpus = 3\n"); err != nil {
		t.Error(err)
	}
}

func TestLoadErrors(t *testing.T) {
	for _, tt := range []struct{ name, content, want string }{
		{"misspelt key", "[hypervisor]\ndefualt_vcpus = 2", "FILE:2: hypervisor.defualt_vcpus: unknown key; did you mean hypervisor.default_vcpus?"},
		{"key of another table", "[runtime]\n\nkernel_params = ''", "FILE:3: runtime.kernel_params: unknown key; did you mean guest.kernel_params?"},
		{"unlike any key", "[guest]\nsomething = 1", "FILE:2: guest.something: unknown key"},
		{"key in no table", "path = '/a'", "FILE:1: path: unknown key"},
		{"other case", "[guest]\nKernel = '/a'", "FILE:2: guest.Kernel: unknown key; did you mean guest.kernel?"},
		{"dotted key", "hypervisor.pth = '/a'", "FILE:1: hypervisor.pth: unknown key; did you mean hypervisor.path?"},
		{"inline table", "guest = { kernel = 'a', krnl = '' }", "FILE:1: guest.krnl: unknown key; did you mean guest.kernel?\nFILE:1: guest.kernel = \"a\": want an absolute path"},
		{"unknown table", "[agent]\na = 1\nb = 2", "FILE:1: [agent]: unknown table; the tables are [hypervisor], [guest], [network], [runtime]"},
		{"unknown table within", "[guest.kernel]\na = 1", "FILE:1: [guest.kernel]: unknown table; the tables are [hypervisor], [guest], [network], [runtime]"},
		{"list of tables", "[[guest]]\nkernel = '/a'", "FILE:1: [[guest]]: want a single table; write [guest]"},
		{"no table", "guest = 1", "FILE:1: guest = 1: want a table; write [guest]"},
		{"syntax", "[guest]\nkernel = /a", "FILE:2: "},
		{"number too large", "[hypervisor]\ndefault_vcpus = 99999999999999999999", "FILE:2: hypervisor.default_vcpus = 99999999999999999999: want a whole number"},
		{"unknown key and syntax", "[guest]\nx = 1\nkernel = \"/a\n", "FILE:2: guest.x: unknown key\nFILE:3: "},
		{"key twice", "[guest]\nkernel = '/a'\nkernel = '/b'", "FILE:3: key kernel is already defined"},
		{"no channel", "[hypervisor]\nchannels = []", "FILE:2: hypervisor.channels = []: no way to the guest is allowed; want a list"},
		{"value over lines", "[hypervisor]\nchannels = [\n  'vhost-vsock', # one\n  7,\n]", "FILE:2: hypervisor.channels = [ 'vhost-vsock', # one 7, ]: want a list"},
		{
			"everything at once", "[hypervisor]\ndefault_vcpus = 0\nuser = 'root'\nx = 1\npath = 3\n[runtime]\nboot_timeout = 'soon'",
			"FILE:4: hypervisor.x: unknown key\n" +
				"FILE:5: hypervisor.path = 3: want an absolute path\n" +
				"FILE:7: runtime.boot_timeout = 'soon': want a duration from \"100ms\" to \"1h\", such as \"90s\" or \"1m30s\"\n" +
				"FILE:2: hypervisor.default_vcpus = 0: want a whole number from 1 to 255\n" +
				"FILE:3: hypervisor.user = \"root\": want empty, or the name or the uid of an account that is not root",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, _, err := load(t, tt.content)
			if err == nil {
				t.Fatal("got no error")
			}
			if got := strings.ReplaceAll(err.Error(), path, "FILE"); !strings.HasPrefix(got, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

func TestLoadSpellings(t *testing.T) {
	for _, content := range []string{
		"[guest]\n\"kernel\" = '''/k'''",
		"guest.kernel = '/k'",
		"guest = { kernel = \"/k\" }",
		"[ guest ]\r\nkernel=\"/k\"\r\n",
		"[runtime]\n[guest]\nkernel = \"/k\" # = not = these",
	} {
		if _, c, err := load(t, content); err != nil || c.Guest.Kernel != "/k" {
			t.Errorf("%q: got kernel %q, %v", content, c.Guest.Kernel, err)
		}
	}
}

func TestDropIns(t *testing.T) {
	dir := t.TempDir()
	path := write(t, filepath.Join(dir, "configuration.toml"), "[hypervisor]\ndefault_vcpus = 2\nchannels = ['virtio-serial', 'vhost-vsock']\n")
	write(t, filepath.Join(dir, "config.d", "20-b.toml"), "[hypervisor]\ndefault_memory_mib = 512\n[guest]\nlog_level = 'info'\n")
	write(t, filepath.Join(dir, "config.d", "10-a.toml"), "[hypervisor]\ndefault_memory_mib = 1024\nchannels = ['vhost-vsock']\n")
	for _, ignored := range []string{"README", "30-c.toml.off", ".40-d.toml"} {
		write(t, filepath.Join(dir, "config.d", ignored), "no TOML")
	}
	want := Default()
	want.Hypervisor.DefaultVCPUs = 2
	want.Hypervisor.DefaultMemoryMiB = 512
	want.Hypervisor.Channels = []Channel{ChannelVhostVsock}
	want.Guest.LogLevel = LogLevelInfo
	got, err := Load(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	bad := write(t, filepath.Join(dir, "config.d", "30-bad.toml"), "\n[hypervisor]\ndefault_vcpus = 1000\n")
	if _, err := Load(path, true); err == nil || !strings.HasPrefix(err.Error(), bad+":3: hypervisor.default_vcpus = 1000: ") {
		t.Errorf("got %v", err)
	}
	// A later file mends a value, and the error is about the one that holds.
	write(t, filepath.Join(dir, "config.d", "40-good.toml"), "hypervisor.default_vcpus = 4\n")
	if got, err := Load(path, true); err != nil || got.Hypervisor.DefaultVCPUs != 4 {
		t.Errorf("got %d, %v", got.Hypervisor.DefaultVCPUs, err)
	}
}

func TestMissingFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "none.toml")
	if _, err := Load(path, true); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("named explicitly: got %v", err)
	}
	got, err := Load(path, false)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("not named (-default +got):\n%s", diff)
	}
	write(t, filepath.Join(dir, "config.d", "a.toml"), "guest.kernel = '/k'")
	if got, err := Load(path, false); err != nil || got.Guest.Kernel != "/k" {
		t.Errorf("drop-in without a file: got %q, %v", got.Guest.Kernel, err)
	}
	if _, err := Load(dir, true); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("directory: got %v", err)
	}
}

func TestPath(t *testing.T) {
	for _, tt := range []struct {
		option, env, want string
		explicit          bool
	}{
		{"", "", DefaultPath, false},
		{"", "/env", "/env", true},
		{"/option", "", "/option", true},
		{"/option", "/env", "/option", true},
	} {
		t.Setenv(EnvPath, tt.env)
		if got, explicit := Path(tt.option); got != tt.want || explicit != tt.explicit {
			t.Errorf("Path(%q) with %s=%q: got %q, %v", tt.option, EnvPath, tt.env, got, explicit)
		}
	}
}

func TestValidateReportsEveryProblem(t *testing.T) {
	var c Config
	c.Hypervisor.Virtiofsd, c.Hypervisor.User, c.Hypervisor.VirtiofsdThreads = "virtiofsd", "root", -1
	err := c.Validate()
	if err == nil {
		t.Fatal("got no error")
	}
	lines := strings.Split(err.Error(), "\n")
	// What may be the zero value: max_vcpus, max_memory_mib, free_page_reporting,
	// vcpu_pinning, cpu_model, kernel_params, port_forward, passt, allowed_sockets,
	// allowed_annotations.
	if want := len(rules()) - 10; len(lines) != want {
		t.Errorf("got %d problems, want %d:\n%v", len(lines), want, err)
	}
	if want := `hypervisor.accelerator = "": want "auto" or "kvm" or "tcg"`; !slices.Contains(lines, want) {
		t.Errorf("got\n%v\nwithout %s", err, want)
	}
}

func TestNeedsPasst(t *testing.T) {
	for _, tt := range []struct {
		host         HostNetwork
		unconfigured UnconfiguredNetwork
		want         bool
	}{
		{HostNetworkUser, UnconfiguredNetworkNone, true},
		{HostNetworkRefuse, UnconfiguredNetworkUser, true},
		{HostNetworkUser, UnconfiguredNetworkUser, true},
		{HostNetworkRefuse, UnconfiguredNetworkNone, false},
	} {
		n := Network{HostNetwork: tt.host, UnconfiguredNetwork: tt.unconfigured}
		if got := n.NeedsPasst(); got != tt.want {
			t.Errorf("%q, %q: got %v", tt.host, tt.unconfigured, got)
		}
	}
}

func TestLogLevel(t *testing.T) {
	for l, want := range map[LogLevel]slog.Level{
		LogLevelDebug: slog.LevelDebug, LogLevelInfo: slog.LevelInfo, LogLevelWarn: slog.LevelWarn, LogLevelError: slog.LevelError, "": slog.LevelInfo,
	} {
		if got := l.Level(); got != want {
			t.Errorf("%q: got %v, want %v", l, got, want)
		}
	}
}
