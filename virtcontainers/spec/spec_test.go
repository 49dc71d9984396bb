package spec

//lint:file-ignore SA1019 Fields that are deprecated may still be set: they are refused by name.

import (
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func ptr[T any](v T) *T { return &v }

// base is a spec that the guest can honour whole.
func base() *specs.Spec {
	return &specs.Spec{
		Version:     "1.3.0",
		Hostname:    "demo",
		Annotations: map[string]string{"run.oci.handler": "wasm"},
		Root:        &specs.Root{Path: "rootfs", Readonly: true},
		Process: &specs.Process{
			Terminal: true, Args: []string{"sh", "-c", "exit 3"}, Cwd: "/", Env: []string{"A=B"},
			User:            specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}},
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 512}},
			Capabilities:    &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}},
			NoNewPrivileges: true, ApparmorProfile: "docker-default", OOMScoreAdj: ptr(100),
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=65536k"}},
			{Destination: "/data", Type: "bind", Source: "/srv/data", Options: []string{"rbind", "ro"}},
			{Destination: "/etc/hosts", Source: "hosts", Options: []string{"bind", "rw"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/default/demo",
			Sysctl:      map[string]string{"net.ipv4.ip_forward": "1", "net/core/somaxconn": "64", "kernel.msgmax": "9"},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace},
				{Type: specs.CgroupNamespace},
			},
			Devices: []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
				Memory:  &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
				CPU:     &specs.LinuxCPU{Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
				Pids:    &specs.LinuxPids{Limit: ptr(int64(20))},
			},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActErrno},
		},
	}
}

func TestTransformGolden(t *testing.T) {
	in := base()
	before, _ := json.Marshal(in)
	plan, err := Transform(in, "c1", false)
	if err != nil {
		t.Fatal(err)
	}
	if after, _ := json.Marshal(in); string(after) != string(before) {
		t.Error("Transform changed its input")
	}
	got, err := json.MarshalIndent(plan, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "plan.golden.json")
	if *update {
		if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got)+"\n" != string(want) {
		t.Errorf("plan differs from %s:\n%s", golden, got)
	}
}

func TestTransformNamesWhatTheGuestCannotHonour(t *testing.T) {
	hooks := func(h specs.Hooks) func(*specs.Spec) { return func(s *specs.Spec) { s.Hooks = &h } }
	one := []specs.Hook{{Path: "/bin/true"}}
	namespace := func(typ specs.LinuxNamespaceType, path string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: typ, Path: path})
		}
	}
	mount := func(m specs.Mount) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Mounts = []specs.Mount{m} }
	}
	device := func(d specs.LinuxDevice) func(*specs.Spec) {
		return func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{d} }
	}
	for field, change := range map[string]func(*specs.Spec){
		"windows":                              func(s *specs.Spec) { s.Windows = &specs.Windows{} },
		"solaris":                              func(s *specs.Spec) { s.Solaris = &specs.Solaris{} },
		"zos":                                  func(s *specs.Spec) { s.ZOS = &specs.ZOS{} },
		"freebsd":                              func(s *specs.Spec) { s.FreeBSD = &specs.FreeBSD{} },
		"vm":                                   func(s *specs.Spec) { s.VM = &specs.VM{} },
		"hooks.prestart":                       hooks(specs.Hooks{Prestart: one}),
		"hooks.createRuntime":                  hooks(specs.Hooks{CreateRuntime: one}),
		"hooks.createContainer":                hooks(specs.Hooks{CreateContainer: one}),
		"hooks.startContainer":                 hooks(specs.Hooks{StartContainer: one}),
		"hooks.poststart":                      hooks(specs.Hooks{Poststart: one}),
		"hooks.poststop":                       hooks(specs.Hooks{Poststop: one}),
		"process.commandLine":                  func(s *specs.Spec) { s.Process.CommandLine = "x" },
		"process.user.username":                func(s *specs.Spec) { s.Process.User.Username = "x" },
		"process.scheduler":                    func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{} },
		"process.ioPriority":                   func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{} },
		"process.execCPUAffinity":              func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{} },
		"linux.uidMappings":                    func(s *specs.Spec) { s.Linux.UIDMappings = make([]specs.LinuxIDMapping, 1) },
		"linux.gidMappings":                    func(s *specs.Spec) { s.Linux.GIDMappings = make([]specs.LinuxIDMapping, 1) },
		"linux.netDevices":                     func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} },
		"linux.intelRdt":                       func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} },
		"linux.memoryPolicy":                   func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{} },
		"linux.timeOffsets":                    func(s *specs.Spec) { s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {}} },
		"linux.seccomp.listenerPath":           func(s *specs.Spec) { s.Linux.Seccomp.ListenerPath = "/x" },
		"linux.namespaces[6] (user)":           namespace(specs.UserNamespace, ""),
		"linux.namespaces[6] (time)":           namespace(specs.TimeNamespace, ""),
		"linux.namespaces[6] (mount).path":     namespace(specs.MountNamespace, "/proc/1/ns/mnt"),
		"linux.namespaces[6] (ipc).path":       namespace(specs.IPCNamespace, "/proc/1/ns/ipc"),
		"linux.devices[0] (/dev/sda)":          device(specs.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8}),
		"linux.devices[0] (/dev/nvidia0)":      device(specs.LinuxDevice{Path: "/dev/nvidia0", Type: "c", Major: 195}),
		"domainname":                           func(s *specs.Spec) { s.Domainname = "x" },
		"mounts[0] (/m).type":                  mount(specs.Mount{Destination: "/m", Type: "nfs", Source: "x"}),
		"mounts[0] (/m).uidMappings":           mount(specs.Mount{Destination: "/m", Type: "bind", Source: "/x", UIDMappings: make([]specs.LinuxIDMapping, 1)}),
		"mounts[0] (m): the destination is no": mount(specs.Mount{Destination: "m", Type: "tmpfs"}),
		"mounts[0] (/m): a bind mount without": mount(specs.Mount{Destination: "/m", Type: "bind"}),
	} {
		t.Run(field, func(t *testing.T) {
			sp := base()
			change(sp)
			_, err := Transform(sp, "c1", false)
			if err == nil || !strings.Contains(err.Error(), field) {
				t.Fatalf("Transform: %v, want an error that names %q", err, field)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			if !errdefs.IsNotImplemented(err) && !errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
		})
	}
}

func TestTransformNamesAllFieldsAtOnce(t *testing.T) {
	sp := base()
	sp.Linux.Resources.Rdma = map[string]specs.LinuxRdma{"mlx": {}}
	sp.Hooks = &specs.Hooks{Prestart: make([]specs.Hook, 1)}
	_, err := Transform(sp, "c1", false)
	if err == nil || !strings.Contains(err.Error(), "rdma") || !strings.Contains(err.Error(), "prestart") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Transform: %v, want both fields in one line", err)
	}
	for _, sp := range []*specs.Spec{nil, {}, {Root: &specs.Root{}, Linux: &specs.Linux{}}} {
		if _, err := Transform(sp, "c1", false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Transform of an incomplete spec: %v", err)
		}
	}
}

func TestTransformNotesWhatMeansAnotherThingInAGuest(t *testing.T) {
	sp := base()
	sp.Process.SelinuxLabel, sp.Linux.MountLabel = "s", "m"
	sp.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}}
	plan, err := Transform(sp, "c1", false)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"process.apparmorProfile=docker-default", "process.selinuxLabel=s", "linux.mountLabel=m",
		"linux.namespaces without pid: the guest's, not the host's", "linux.namespaces without uts: the guest's, not the host's",
	}
	if !slices.Equal(plan.Notes, want) {
		t.Errorf("notes %q, want %q", plan.Notes, want)
	}
}

func TestTransformJoinsAPodsNamespaces(t *testing.T) {
	const host = "/proc/4711/ns/"
	paths := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace, Path: host + "pid"},
		{Type: specs.IPCNamespace, Path: host + "ipc"},
		{Type: specs.UTSNamespace, Path: host + "uts"},
		{Type: specs.NetworkNamespace, Path: host + "net"},
		{Type: specs.MountNamespace},
	}
	shm := specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/run/sandboxes/1/shm", Options: []string{"rbind", "ro"}}
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		want       []specs.LinuxNamespace
		hostname   string
		guest      map[string]string
		shm        specs.Mount
	}{
		"all shared": {
			namespaces: paths,
			want:       []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/run/husk/ns/pid"}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}},
			guest:      map[string]string{"net.core.somaxconn": "1", "kernel.shmmax": "2"},
			shm:        specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/run/husk/shm", Options: []string{"rbind", "nosuid", "noexec", "nodev", "ro"}},
		},
		"all private": {
			namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}},
			want:       []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.CgroupNamespace}},
			hostname:   "demo",
			guest:      map[string]string{"net.core.somaxconn": "1"},
			shm:        specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=4096"}},
		},
		"one of each": {
			namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, paths[1], {Type: specs.UTSNamespace}, paths[3]},
			want:       []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.UTSNamespace}, {Type: specs.CgroupNamespace}},
			hostname:   "demo",
			guest:      map[string]string{"net.core.somaxconn": "1", "kernel.shmmax": "2"},
			shm:        specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/run/husk/shm", Options: []string{"rbind", "nosuid", "noexec", "nodev", "ro"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			sp := base()
			sp.Linux.Namespaces = tt.namespaces
			sp.Linux.Sysctl = map[string]string{"net.core.somaxconn": "1", "kernel.shmmax": "2"}
			sp.Mounts = []specs.Mount{{Destination: "/a", Type: "bind", Source: "/a"}, shm, {Destination: "/b", Type: "bind", Source: "/b"}}
			p, err := Transform(sp, "c1", true)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(p.Spec.Linux.Namespaces, tt.want) {
				t.Errorf("namespaces %v, want %v", p.Spec.Linux.Namespaces, tt.want)
			}
			if p.Spec.Hostname != tt.hostname {
				t.Errorf("hostname %q, want %q", p.Spec.Hostname, tt.hostname)
			}
			if !maps.Equal(p.Sysctls, tt.guest) {
				t.Errorf("sysctls of the guest %v, want %v", p.Sysctls, tt.guest)
			}
			if p.Shm == nil || p.Shm.Source != shm.Source {
				t.Fatalf("shared memory %v", p.Shm)
			}
			p.GuestShm(4096)
			if got := p.Spec.Mounts[1]; !reflect.DeepEqual(got, tt.shm) {
				t.Errorf("mount %v, want %v", got, tt.shm)
			}
			p.Binds[2].At("/run/husk/b", false)
			if p.Spec.Mounts[2].Source != "/run/husk/b" || !p.Binds[1].Unused || p.Binds[0].Unused || p.Binds[2].Unused {
				t.Errorf("mounts %v, binds %v", p.Spec.Mounts, p.Binds)
			}
		})
	}
}

func TestNetworkOfASpec(t *testing.T) {
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		want       Network
	}{
		"none":  {nil, Network{Host: true}},
		"new":   {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, Network{}},
		"given": {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}, Network{Path: "/run/netns/x"}},
	} {
		sp := base()
		sp.Linux.Namespaces = tt.namespaces
		p, err := Transform(sp, "c1", false)
		if err != nil || p.Network != tt.want {
			t.Errorf("%s: %+v, %v; want %+v", name, p.Network, err, tt.want)
		}
		sp.Mounts = append(sp.Mounts, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/pods/shm"})
		pod, err := Pod(sp)
		if err != nil || pod.Network != tt.want || !maps.Equal(pod.Sysctls, sp.Linux.Sysctl) || pod.Shm == nil || pod.Shm.Source != "/pods/shm" {
			t.Errorf("%s, of a pod: %+v, %v; want %+v, all sysctls, and the shared memory", name, pod, err, tt.want)
		}
	}
}

func TestATmpfsAtDevShmIsThePodsWhereItsIPCIs(t *testing.T) {
	tmpfs := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "size=65536k"}}
	shared := specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/run/husk/shm", Options: []string{"rbind", "nosuid", "noexec", "nodev"}}
	join := specs.LinuxNamespace{Type: specs.IPCNamespace, Path: "/proc/1/ns/ipc"}
	own := specs.LinuxNamespace{Type: specs.IPCNamespace}
	for name, tt := range map[string]struct {
		pod  bool
		ipc  specs.LinuxNamespace
		want specs.Mount
	}{
		"a pod's":       {true, join, shared},
		"its own":       {true, own, tmpfs},
		"of one, alone": {false, own, tmpfs},
	} {
		sp := base()
		sp.Linux.Namespaces = []specs.LinuxNamespace{tt.ipc}
		sp.Mounts = []specs.Mount{tmpfs}
		p, err := Transform(sp, "c1", tt.pod)
		if err != nil || !reflect.DeepEqual(p.Spec.Mounts[0], tt.want) || p.Shm != nil {
			t.Errorf("%s: %+v, %v, %v; want %+v", name, p.Spec.Mounts, p.Shm, err, tt.want)
		}
	}
}
