package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func privilegedPod(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func privileged(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }

func TestDNSAndHostname(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("dns", func(c *runtime.PodSandboxConfig) {
			c.Hostname = "named"
			c.DnsConfig = &runtime.DNSConfig{
				Servers: []string{"192.0.2.1", "2001:db8::1"}, Searches: []string{"a.test", "b.test"}, Options: []string{"ndots:5"},
			}
		})
		for _, name := range []string{"a", "b"} {
			c := p.start(name, idle)
			c.want("grep -v '^#' /etc/resolv.conf", "search a.test b.test\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5")
			c.want("hostname", "named")
			c.want("cat /etc/hostname", "named")
		}
	})
}

// TestFilesOfTheNode is how a kubelet gives hosts, service accounts, volumes
// and the termination log.
func TestFilesOfTheNode(t *testing.T) {
	each(t, setup{}, func(e *env) {
		dir := filepath.Join(e.d.Dir, "kubelet")
		volume := filepath.Join(dir, "volume")
		if err := os.MkdirAll(volume, 0o755); err != nil {
			e.Fatal(err)
		}
		hosts, termination := filepath.Join(dir, "hosts"), filepath.Join(dir, "termination")
		for path, text := range map[string]string{hosts: "192.0.2.9 example.test\n", termination: "", filepath.Join(volume, "f"): "from the node\n"} {
			if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
				e.Fatal(err)
			}
		}
		p := e.run("files")
		mounts := func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{
				{HostPath: hosts, ContainerPath: "/etc/hosts", Readonly: true},
				{HostPath: termination, ContainerPath: "/dev/termination-log"},
				{HostPath: volume, ContainerPath: "/volume"},
				{HostPath: volume, ContainerPath: "/read-only", Readonly: true},
			}
		}
		a, b := p.start("a", idle, mounts), p.start("b", idle, mounts)
		a.want("cat /etc/hosts /volume/f", "192.0.2.9 example.test\nfrom the node")
		a.sh("echo from a > /volume/g; echo last words > /dev/termination-log")
		b.want("cat /volume/g /read-only/g", "from a\nfrom a")
		if r := b.exec("echo > /read-only/h"); r.code == 0 {
			e.Error("a read-only mount was written to")
		}
		a.stop() // so long it may keep its last words to itself
		for path, want := range map[string]string{termination: "last words\n", filepath.Join(volume, "g"): "from a\n"} {
			if got, err := os.ReadFile(path); string(got) != want {
				e.Errorf("%s on the node: %q, %v; want %q", path, got, err, want)
			}
		}
	})
}

func TestSysctlsOfThePod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("sysctls", func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{
				"net.ipv4.ip_local_port_range": "20000 21000",
				"kernel.msgmax":                "4096",
				"kernel.shm_rmid_forced":       "1",
			}
		})
		for _, name := range []string{"a", "b"} {
			c := p.start(name, idle)
			c.want("cat /proc/sys/net/ipv4/ip_local_port_range | tr '\\t' ' '", "20000 21000")
			c.want("cat /proc/sys/kernel/msgmax", "4096")
			c.want("cat /proc/sys/kernel/shm_rmid_forced", "1")
		}
	})
}

func TestUsersAndSupplementalGroups(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("users")
		a := p.start("a", "id; "+idle, func(c *runtime.ContainerConfig) {
			s := c.Linux.SecurityContext
			s.RunAsUser, s.RunAsGroup = &runtime.Int64Value{Value: 1234}, &runtime.Int64Value{Value: 2345}
			s.SupplementalGroups = []int64{3456, 4567}
		})
		a.want("id -u; id -g; id -G", "1234\n2345\n2345 3456 4567")
		a.want("touch /tmp/mine && stat -c %u:%g /tmp/mine", "1234:2345")
		if r := a.exec("touch /etc/mine"); r.code == 0 {
			e.Error("a user wrote to root's directory")
		}
		// The image's groups of a named user come with it: daemon is in audio.
		b := p.start("b", idle, func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "daemon" })
		b.want("id -un; id -G", "daemon\n1 29")
	})
}

func TestReadOnlyRoot(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("readonly")
		a := p.start("a", idle, func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true })
		if r := a.exec("touch /f"); r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
			e.Errorf("write to a read-only root: %v", r)
		}
		a.sh("touch /dev/shm/f")
		p.start("b", idle).sh("touch /f") // is a sibling's own affair
	})
}

func TestCapabilitiesAndNoNewPrivileges(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("capabilities")
		a := p.start("a", idle, func(c *runtime.ContainerConfig) {
			s := c.Linux.SecurityContext
			s.NoNewPrivs = true
			s.Capabilities = &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}
		})
		a.want("grep -E '^(CapEff|NoNewPrivs)' /proc/self/status | tr '\\t' ' '", "CapEff: 0000000000000400\nNoNewPrivs: 1")
		b := p.start("b", idle)
		b.want("grep ^CapEff /proc/self/status | tr '\\t' ' '", "CapEff: 00000000a80425fb")
	})
}

// profile refuses to make directories, and nothing else.
const profile = `{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
	"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`

func TestSeccompProfiles(t *testing.T) {
	each(t, setup{}, func(e *env) {
		path := filepath.Join(e.d.Dir, "seccomp.json")
		if err := os.WriteFile(path, []byte(profile), 0o600); err != nil {
			e.Fatal(err)
		}
		p := e.run("seccomp")
		with := func(profile *runtime.SecurityProfile) func(*runtime.ContainerConfig) {
			return func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Seccomp = profile }
		}
		const mode = "grep ^Seccomp: /proc/self/status | tr '\\t' ' '"
		local := p.start("local", idle, with(&runtime.SecurityProfile{
			ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: path,
		}))
		local.want(mode, "Seccomp: 2")
		if r := local.exec("mkdir /tmp/d"); r.code == 0 || !strings.Contains(r.stderr, "not supported") {
			e.Errorf("a system call that the profile refuses: %v", r)
		}
		standard := p.start("default", idle, with(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}))
		standard.want(mode, "Seccomp: 2")
		standard.sh("mkdir /tmp/d")
		if r := standard.exec("unshare -U true"); r.code == 0 {
			e.Error("the default profile let a user namespace be made")
		}
		p.start("none", idle, with(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined})).want(mode, "Seccomp: 0")
	})
}

// TestPrivilegedIsSoInItsGuest: privileged, but not on the node.
func TestPrivilegedIsSoInItsGuest(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("privileged", privilegedPod)
		a := p.start("a", idle, privileged)
		a.sh("mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m")
		a.sh("echo 1 > /proc/sys/net/ipv4/ip_forward")
		a.want("grep ^Seccomp: /proc/self/status | tr '\\t' ' '", "Seccomp: 0")
		if !e.isHusk() {
			return
		}
		node, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			e.Fatal(err)
		}
		if got := a.sh("cat /proc/sys/kernel/random/boot_id"); got == strings.TrimSpace(string(node)) {
			e.Error("a privileged container is on the node's kernel")
		}
		// No device of the node's comes by surprise.
		for _, name := range []string{"kvm", "vhost-net", "vhost-vsock", "net/tun"} {
			if r := a.exec("test ! -e /dev/" + name); r.code != 0 {
				e.Errorf("/dev/%s is in the container", name)
			}
		}
	})
}

// TestPrivilegedUsesADeviceOfItsGuest: the node's path means the guest's device.
func TestPrivilegedUsesADeviceOfItsGuest(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		if strings.Contains(e.Name(), "/containerd-1.6/") {
			e.Skip("containerd 1.6 allows a privileged container no more devices than another one")
		}
		p := e.run("device", privilegedPod)
		a := p.start("a", idle, privileged, func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/dev/net/tun", ContainerPath: "/dev/net/tun"}}
		})
		a.want("tunctl -t tun7 > /dev/null && ip link show tun7 | grep -o tun7:", "tun7:")
	})
}

func TestResourcesAreTheContainers(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("resources")
		c := p.start("a", idle, func(c *runtime.ContainerConfig) {
			c.Linux.Resources.MemoryLimitInBytes = 64 << 20
			c.Linux.Resources.CpuPeriod, c.Linux.Resources.CpuQuota = 100_000, 50_000
		})
		// cgroup v1 on the node; v2 in a guest, mounted whole or from the container's own on
		const first = "cd /sys/fs/cgroup; cat ./$(sed -n s/^0:://p /proc/self/cgroup)/%[1]s %[1]s %[2]s 2>/dev/null | head -n 1"
		c.want(fmt.Sprintf(first, "memory.max", "memory/memory.limit_in_bytes"), "67108864")
		c.want(fmt.Sprintf(first, "cpu.max", "cpu/cpu.cfs_quota_us")+" | cut -d ' ' -f 1", "50000")
	})
}
