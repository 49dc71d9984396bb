package check

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
)

var update = flag.Bool("update", false, "write the golden files")

// host makes files that a pod could start with, and a configuration that names
// them; replace puts other values in it.
func host(t *testing.T, replace ...string) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	write := func(name, content string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("qemu", "#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian)'\n", 0o755)
	write("virtiofsd", "#!/bin/sh\necho 'virtiofsd 1.13.2'\n", 0o755)
	kernel := make([]byte, 5*512)
	copy(kernel[0x1fe:], "\x55\xaaxxHdrS")
	write("kernel", string(kernel), 0o644)
	write("cut", string(kernel[:2000]), 0o644)
	write("initrd", "\x1f\x8b\x08", 0o644)
	content := strings.NewReplacer(append(replace, "DIR", dir)...).Replace(`[hypervisor]
path = "DIR/qemu"
accelerator = "tcg"
channels = ["virtio-serial"]
user = "65534"
virtiofsd = "DIR/virtiofsd"
[guest]
kernel = "DIR/kernel"
initrd = "DIR/initrd"
[network]
host_network = "refuse"
passt = "DIR/passt"
`)
	content = strings.ReplaceAll(content, "DIR", dir)
	write("husk.toml", content, 0o644)
	return dir, filepath.Join(dir, "husk.toml")
}

// independent drops the lines that tell of the host that runs the test.
func independent(results []Result) []Result {
	var kept []Result
	for _, r := range results {
		if !slices.Contains([]string{"tun", "vhost-net", "nftables", "cgroups", "inotify"}, r.Name) {
			kept = append(kept, r)
		}
	}
	return kept
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name    string
		replace []string
		failed  bool
	}{
		{"good", nil, false},
		{"everything missing", []string{"DIR/qemu", "DIR/none", "DIR/virtiofsd", "DIR/none", "DIR/kernel", "DIR/none", "DIR/initrd", "DIR/none", "65534", "no-such-account", "refuse", "user", "DIR/passt", "DIR/none"}, true},
		{"truncated kernel and another image", []string{"DIR/kernel", "DIR/cut", "DIR/initrd", "DIR/kernel"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, path := host(t, tt.replace...)
			results := Run(t.Context(), path, true, func(h config.Hypervisor) hypervisor.Hypervisor {
				return qemu.New(qemu.Options{Path: h.Path, Accelerator: string(h.Accelerator), Channels: []string{string(h.Channels[0])}})
			})
			if Failed(results) != tt.failed {
				t.Errorf("failed is %v", !tt.failed)
			}
			var out strings.Builder
			if err := Print(&out, independent(results)); err != nil {
				t.Fatal(err)
			}
			golden(t, strings.ReplaceAll(tt.name, " ", "-")+".txt", strings.ReplaceAll(out.String(), dir, "DIR"))
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestConfiguration(t *testing.T) {
	t.Run("every problem has its line", func(t *testing.T) {
		_, path := host(t, "tcg", "xen", "65534", "root")
		_, results := configuration(path, true)
		want := []Result{
			{Fail, "config", path + `:3: hypervisor.accelerator = "xen": want "auto" or "kvm" or "tcg"`},
			{Fail, "config", path + `:5: hypervisor.user = "root": want empty, or the name or the uid of an account that is not root`},
			{Warn, "config", "what follows was checked with the defaults; correct the lines above"},
		}
		if diff := cmp.Diff(want, results); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	t.Run("no file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none.toml")
		if _, results := configuration(path, false); Failed(results) || !strings.Contains(results[0].Text, "the defaults and config.d hold") {
			t.Errorf("got %v", results)
		}
		if _, results := configuration(path, true); !Failed(results) {
			t.Errorf("named explicitly: got %v", results)
		}
	})
}

// A backend finds what it is told to.
type backend struct {
	hypervisor.Hypervisor
	found hypervisor.Capabilities
}

func (b backend) Check(context.Context) (hypervisor.Capabilities, error) {
	return b.found, b.found.Err()
}

func TestMonitor(t *testing.T) {
	had := func(value string) hypervisor.Capability { return hypervisor.Capability{Value: value} }
	second := func(value string) hypervisor.Capability {
		return hypervisor.Capability{Value: value, Reason: "cause; remedy"}
	}
	h := config.Hypervisor{Path: "/qemu"}
	for _, tt := range []struct {
		name  string
		found hypervisor.Capabilities
		want  []Result
	}{
		{"best", hypervisor.Capabilities{Version: had("7.2.22"), Accelerator: had("kvm"), Channel: had("vhost-vsock")}, []Result{
			{OK, "qemu", "/qemu 7.2.22"}, {OK, "kvm", "/dev/kvm"}, {OK, "channel", "vhost-vsock"},
		}},
		{"chosen", hypervisor.Capabilities{Version: had("10.0"), Accelerator: had("tcg"), Channel: had("virtio-serial")}, []Result{
			{OK, "qemu", "/qemu 10.0"}, {OK, "kvm", `not used: hypervisor.accelerator is "tcg"`}, {OK, "channel", "virtio-serial"},
		}},
		{"second best", hypervisor.Capabilities{Version: had("10.0"), Accelerator: second("tcg"), Channel: second("virtio-serial")}, []Result{
			{OK, "qemu", "/qemu 10.0"},
			{Warn, "kvm", "pods run under TCG, many times slower: cause; remedy"},
			{Warn, "channel", "virtio-serial instead of vhost-vsock: cause; remedy"},
		}},
		{"nothing", hypervisor.Capabilities{Version: second(""), Accelerator: second(""), Channel: second("")}, []Result{
			{Fail, "qemu", "cause; remedy"}, {Fail, "kvm", "cause; remedy"}, {Fail, "channel", "cause; remedy"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, monitor(t.Context(), backend{found: tt.found}, h)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestCgroups(t *testing.T) {
	const (
		root    = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
		unified = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
		memory  = "31 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
		cpu     = "32 22 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
		pids    = "33 22 0:29 / /sys/fs/cgroup/pids rw - cgroup none rw,pids\n"
	)
	for _, tt := range []struct {
		name, mounts, unified string
		level                 Level
		text                  string
	}{
		{"v2", root + unified, "cpuset cpu io memory pids\n", OK, "v2 with cpu, memory, pids"},
		{"v1", root + memory + cpu + pids, "", OK, "v1 with cpu, memory, pids"},
		{"v1 beside an empty v2", unified + memory + cpu + pids, "", OK, "v1 with cpu, memory, pids"},
		{"v2 without pids", unified, "cpu memory", Warn, "v2 with cpu, memory, but without pids: pods are not bounded by it on the host; switch it on in the kernel and mount it"},
		{"none", root, "", Warn, "no controller: pods are not bounded on the host; mount the cgroup file systems"},
		{"garbage", "x\n - \n", "", Warn, "no controller: pods are not bounded on the host; mount the cgroup file systems"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := cgroups(tt.mounts, func(dir string) string {
				if dir != "/sys/fs/cgroup" {
					t.Errorf("asked for controllers at %q", dir)
				}
				return tt.unified
			})
			if want := (Result{tt.level, "cgroups", tt.text}); got != want {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

// This test's program is not installed, and so nothing is beside it.
func TestVirtiofsdOfCWantsItsPreload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "virtiofsd")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho 'virtiofsd version 7.2.22'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := virtiofsd(t.Context(), path)
	if r.Level != Warn || !strings.HasPrefix(r.Text, path+" 7.2.22 (C): ") || !strings.Contains(r.Text, "virtiofsd-preload.so") {
		t.Errorf("%+v", r)
	}
}
