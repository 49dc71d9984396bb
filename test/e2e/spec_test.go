package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cgroupFile prints a control file of the container's own cgroup, by its name
// in version 2 of the interface or its path in version 1.
const cgroupFile = `control() {
	own=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
	cat $own/$1 2>/dev/null || cat /sys/fs/cgroup/$2
}
`

// cgroupMount makes cgroupFile work: containerd's default spec has no cgroups.
const cgroupMount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"

// TestFlags has one container for each thing that ctr has a flag for.
func TestFlags(t *testing.T) {
	for _, test := range []struct {
		name, script string
		flags        []string
		want         string
	}{
		{"Env", "echo $A; env | grep -c '^A='", []string{"--env", "A=one two"}, "one two\n1\n"},
		{"Cwd", "pwd", []string{"--cwd", "/etc"}, "/etc\n"},
		{"ReadOnlyRootfs", "touch /file 2>&1; echo $?", []string{"--read-only"}, "touch: /file: Read-only file system\n1\n"},
		{"WritableRootfs", "echo text > /file && cat /file && rm /file && ls /file 2>&1", nil, "text\nls: /file: No such file or directory\n"},
		{"NoNewPrivileges", "grep NoNewPrivs /proc/self/status", nil, "NoNewPrivs:\t1\n"},
		{"NewPrivileges", "grep NoNewPrivs /proc/self/status", []string{"--allow-new-privs"}, "NoNewPrivs:\t0\n"},
		{"Seccomp", "grep Seccomp: /proc/self/status", []string{"--seccomp"}, "Seccomp:\t2\n"},
		{"Capability", "grep CapEff /proc/self/status", []string{"--cap-drop", "CAP_CHOWN"}, "CapEff:\t00000000a80425fa\n"},
		{"MaskedPaths", "wc -c < /proc/keys; ls /sys/firmware", nil, "0\n"},
		{"ReadOnlyPaths", "echo 1 > /proc/sys/kernel/printk", nil, ""},
		{
			"Tmpfs", "df -m /mnt/t | tail -n 1 | awk '{print $2}'; dd if=/dev/zero of=/mnt/t/f bs=1M count=3 2>&1 | grep -o 'No space.*'",
			[]string{"--mount", "type=tmpfs,src=tmpfs,dst=/mnt/t,options=size=2m:nosuid"},
			"2\nNo space left on device\n",
		},
		{
			"MemoryLimit", cgroupFile + "control memory.max memory/memory.limit_in_bytes",
			[]string{"--memory-limit", "67108864", "--mount", cgroupMount},
			"67108864\n",
		},
		{
			"CPULimit", cgroupFile + "set -- $(control cpu.max cpu/cpu.cfs_quota_us); echo $1",
			[]string{"--cpus", "0.5", "--mount", cgroupMount},
			"50000\n",
		},
		{
			"OutOfMemory", "dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null; echo $?",
			[]string{"--memory-limit", "67108864"},
			"137\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			each(t, func(e *env) {
				if r := e.sh(test.script, test.flags...); r.stdout != test.want {
					e.Errorf("%v, want stdout %q", r, test.want)
				}
			})
		})
	}
}

// TestSpec has one container for each field that ctr has no flag for.
func TestSpec(t *testing.T) {
	for _, test := range []struct {
		name, script string
		edit         func(*specs.Spec)
		want         string
	}{
		{"User", "id -u; id -g; id -G", func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1, GID: 1, AdditionalGids: []uint32{29}}
		}, "1\n1\n1 29\n"},
		{"Umask", "umask", func(s *specs.Spec) {
			umask := uint32(0o27)
			s.Process.User.Umask = &umask
		}, "0027\n"},
		{"Hostname", "hostname", func(s *specs.Spec) { s.Hostname = "inside" }, "inside\n"},
		{"Capabilities", "grep -E 'Cap(Eff|Bnd|Amb)' /proc/self/status", func(s *specs.Spec) {
			only := []string{"CAP_NET_BIND_SERVICE"}
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: only, Effective: only, Permitted: only}
		}, "CapEff:\t0000000000000400\nCapBnd:\t0000000000000400\nCapAmb:\t0000000000000000\n"},
		{"Rlimits", "ulimit -n; ulimit -c", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 512, Hard: 512}, {Type: "RLIMIT_CORE"}}
		}, "512\n0\n"},
		{"Sysctl", "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_default_ttl", func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_default_ttl": "33"}
		}, "1\n33\n"},
		{"PidsLimit", "i=0; while [ $i -lt 20 ]; do sleep 1000 & i=$((i+1)); done; echo unlimited", func(s *specs.Spec) {
			limit := int64(8)
			s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &limit}
		}, ""},
		{"ShmSize", "df -m /dev/shm | tail -n 1 | awk '{print $2}'", func(s *specs.Spec) {
			for i, m := range s.Mounts {
				if m.Destination == "/dev/shm" {
					s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev", "mode=1777", "size=16384k"}
				}
			}
		}, "16\n"},
		{"Device", "echo > /dev/own && stat -c '%t %T %a' /dev/own", func(s *specs.Spec) {
			mode := os.FileMode(0o620)
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/own", Type: "c", Major: 1, Minor: 3, FileMode: &mode}}
		}, "1 3 620\n"},
		{"DeviceDenied", "mknod /kmem c 1 1 && cat /kmem 2>&1", func(s *specs.Spec) {
			s.Process.Capabilities.Effective = append(s.Process.Capabilities.Effective, "CAP_SYS_RAWIO")
			s.Process.Capabilities.Permitted = append(s.Process.Capabilities.Permitted, "CAP_SYS_RAWIO")
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_SYS_RAWIO")
		}, "cat: can't open '/kmem': Operation not permitted\n"},
		{"SeccompErrno", "mkdir /tmp/d 2>&1; touch /tmp/f && echo touched", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow,
				Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}},
			}
		}, "mkdir: can't create directory '/tmp/d': Operation not permitted\ntouched\n"},
		{"MaskedFile", "cat /etc/passwd; ls /root", func(s *specs.Spec) {
			s.Linux.MaskedPaths = []string{"/etc/passwd", "/root"}
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			each(t, func(e *env) {
				if r := e.runSpec(test.script, test.edit); r.stdout != test.want {
					e.Errorf("%v, want stdout %q", r, test.want)
				}
			})
		})
	}
}

func TestBindMounts(t *testing.T) {
	each(t, func(e *env) {
		host := e.TempDir()
		e.writeFile(filepath.Join(host, "in"), []byte("from the host\n"))
		r := e.sh("cat /mnt/rw/in /mnt/file; echo from inside > /mnt/rw/out; touch /mnt/ro/x; touch /mnt/ro/in",
			"--mount", "type=bind,src="+host+",dst=/mnt/rw,options=rbind:rw",
			"--mount", "type=bind,src="+host+",dst=/mnt/ro,options=rbind:ro",
			"--mount", "type=bind,src="+filepath.Join(host, "in")+",dst=/mnt/file,options=rbind:ro")
		if r.stdout != "from the host\nfrom the host\n" || strings.Count(r.stderr, "Read-only file system") != 2 {
			e.Errorf("%v", r)
		}
		if out, err := os.ReadFile(filepath.Join(host, "out")); string(out) != "from inside\n" {
			e.Errorf("on the host: %q, %v", out, err)
		}
	})
}

// A file system that only the container's own mount namespace held would be
// unmounted inside the exit of its last process, where Linux 6.1 can stop that for
// good: "Busy inodes after unmount of virtiofs". The agent holds each, and what is
// mounted below it.
func TestFileSystemsOutliveTheContainersLastProcess(t *testing.T) {
	eachHusk(t, func(e *env) {
		host := e.TempDir()
		below := filepath.Join(host, "below")
		if err := os.Mkdir(below, 0o755); err != nil {
			e.Fatal(err)
		}
		if err := unix.Mount("below", below, "tmpfs", 0, ""); err != nil {
			e.Fatal(err)
		}
		e.Cleanup(func() {
			if err := unix.Unmount(below, unix.MNT_DETACH); err != nil {
				e.Error(err)
			}
		})
		r := e.runSpec("awk '$5 ~ /share\\/(.volumes|run-)/ { print $5 }' /proc/1/mountinfo", func(s *specs.Spec) {
			// The guest's processes, and leave to look at its first.
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.PIDNamespace })
			for _, set := range []*[]string{&s.Process.Capabilities.Bounding, &s.Process.Capabilities.Effective, &s.Process.Capabilities.Permitted} {
				*set = append(*set, "CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
			}
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: host, Options: []string{"rbind"}})
		})
		dir := "/run/husk/share/"
		want := []string{dir + ".volumes/1", dir + ".volumes/1/below", dir + e.d.ID("run") + "-1/rootfs"}
		if got := lines(r.stdout); !slices.Equal(slices.Sorted(slices.Values(got)), want) {
			e.Errorf("the agent holds %q, want %q: %v", got, want, r)
		}
	})
}
