package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/images"
)

// allow gives a spec capabilities, and devices of the kernel's, with all access.
func allow(s *specs.Spec, capabilities []string, devices ...specs.LinuxDevice) {
	for _, set := range []*[]string{&s.Process.Capabilities.Bounding, &s.Process.Capabilities.Effective, &s.Process.Capabilities.Permitted} {
		*set = append(*set, capabilities...)
	}
	for _, d := range devices {
		s.Linux.Devices = append(s.Linux.Devices, d)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
			specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: "rwm"})
	}
}

var (
	devFuse = specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}
	devTun  = specs.LinuxDevice{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200}
)

// goBuild builds a static program with a go command, and returns a bind of it on
// /mnt/program.
func (e *env) goBuild(command string, args ...string) specs.Mount {
	e.Helper()
	program := filepath.Join(e.TempDir(), "program")
	build := exec.Command("go", append([]string{command, "-o", program}, args...)...)
	build.Dir, build.Env = e.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		e.Fatalf("%v: %v\n%s", build, err, out)
	}
	return specs.Mount{Destination: "/mnt/program", Type: "bind", Source: program, Options: []string{"bind", "ro"}}
}

func TestFUSE(t *testing.T) {
	each(t, func(e *env) {
		program := e.goBuild("build", "./test/e2e/testdata/fusefile")
		r := e.runSpec("/mnt/program", func(s *specs.Spec) {
			allow(s, []string{"CAP_SYS_ADMIN"}, devFuse)
			s.Mounts = append(s.Mounts, program)
		})
		if r.stdout != "from a FUSE file system\n" {
			e.Errorf("%v", r)
		}
	})
}

// TestStoragesOfMemory runs the tests of the agent's storages on the guest's kernel,
// which has huge pages to give.
func TestStoragesOfMemory(t *testing.T) {
	eachHusk(t, func(e *env) {
		program := e.goBuild("test", "-c", "./agent/storage")
		r := e.runSpec("HUSK_TEST_IN_GUEST=1 /mnt/program -test.v -test.timeout=2m", func(s *specs.Spec) {
			privileged(s)
			s.Mounts = append(s.Mounts, program)
		})
		if r.code != 0 || strings.Contains(r.stdout, "--- SKIP") || !strings.Contains(r.stdout, "--- PASS: TestKernelsHugePagesOnDemand") {
			e.Errorf("%v", r)
		}
	})
}

// TestHugePagesWithoutALimit is the kubelet's volume of huge pages as it comes with
// containerd: the file system has no size, and the container no limit.
func TestHugePagesWithoutALimit(t *testing.T) {
	eachHusk(t, func(e *env) {
		host := e.TempDir()
		if err := unix.Mount("none", host, "hugetlbfs", 0, "pagesize=2M"); err != nil {
			e.Fatal(err)
		}
		e.Cleanup(func() {
			if err := unix.Unmount(host, 0); err != nil {
				e.Error(err)
			}
		})
		const script = `fallocate -l 8388608 /mnt/huge/file && stat -c %s /mnt/huge/file
fallocate -l 1099511627776 /mnt/huge/file 2>&1 | grep -o 'No space.*'; rm /mnt/huge/file`
		r := e.sh(script, bind(host, "/mnt/huge", "rw")...)
		if want := "8388608\nNo space left on device\n"; r.stdout != want || r.code != 0 {
			e.Errorf("%v, want %q", r, want)
		}
	})
}

// TestTun makes an interface by /dev/net/tun. That opening it succeeds is the
// kernel's doing: it has the module loaded, which is not there at first.
func TestTun(t *testing.T) {
	each(t, func(e *env) {
		const script = "grep -c '^tun ' /proc/modules; tunctl -t tun7 > /dev/null && ip link show tun7 | grep -o 'tun7:'; grep -c '^tun ' /proc/modules"
		r := e.runSpec(script, func(s *specs.Spec) { allow(s, []string{"CAP_NET_ADMIN"}, devTun) })
		want := "0\ntun7:\n1\n"
		if !strings.Contains(*runtimeFlag, "husk") { // whose kernel is the host's
			want = "tun7:\n"
		}
		if !strings.Contains(r.stdout, want) {
			e.Errorf("%v, want %q", r, want)
		}
	})
}

// TestModulesOnDemand asks the kernel for what needs a module of the guest's image.
func TestModulesOnDemand(t *testing.T) {
	eachHusk(t, func(e *env) {
		const script = `
echo at first $(grep -cE '^(overlay|veth|bridge|wireguard|nf_tables|loop) ' /proc/modules)
mkdir /tmp/m /tmp/m/l /tmp/m/t && mount -t tmpfs tmpfs /tmp/m/t && mkdir /tmp/m/t/u /tmp/m/t/w && echo low > /tmp/m/l/f
mount -t overlay -o lowerdir=/tmp/m/l,upperdir=/tmp/m/t/u,workdir=/tmp/m/t/w overlay /tmp/m/l && cat /tmp/m/l/f && echo over > /tmp/m/l/f && cat /tmp/m/t/u/f
ip link add v0 type veth peer name v1 && ip link add b0 type bridge && ip link add w0 type wireguard && ip link add x0 type vxlan id 5 dstport 4789 dev lo; ip link | grep -oE '^[0-9]+: (v0|b0|w0|x0)[@:]' | cut -d' ' -f2 | sort
ip link add n0 type nosuch 2>&1 | grep -c 'not supp'
echo now $(grep -cE '^(overlay|veth|bridge|wireguard|vxlan|ip6_udp_tunnel) ' /proc/modules)
`
		r := e.runSpec(script, func(s *specs.Spec) { allow(s, []string{"CAP_SYS_ADMIN", "CAP_NET_ADMIN"}) })
		if want := "at first 0\nlow\nover\nb0:\nv0@\nw0:\nx0:\n1\nnow 6\n"; r.stdout != want {
			e.Errorf("%v, want %q", r, want)
		}
	})
}

// TestPacketFilter has nft set up what VPNs, service meshes and containers in
// containers ask of the kernel first of all: it is in modules.
func TestPacketFilter(t *testing.T) {
	nft, err := images.Program("/usr/sbin/nft")
	if err != nil {
		t.Skip(err)
	}
	eachHusk(t, func(e *env) {
		const script = `nft -f - <<'END' && nft list ruleset | grep -cE 'masquerade|redirect|reject|ct state'
table inet t {
	chain post { type nat hook postrouting priority 100; oifname "eth0" masquerade; }
	chain pre { type nat hook prerouting priority -100; tcp dport 80 redirect to :8080; }
	chain in { type filter hook input priority 0; ct state established accept; tcp dport 90 reject; }
}
END
`
		r := e.runSpec(script, func(s *specs.Spec) {
			if err := images.Unpack(s.Root.Path, nft); err != nil {
				e.Fatal(err)
			}
			allow(s, []string{"CAP_NET_ADMIN"})
		})
		if r.stdout != "4\n" {
			e.Errorf("%v", r)
		}
	})
}
