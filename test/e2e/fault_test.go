package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

// oneClearError wants a failure that ctr tells in one line which holds all of
// want. That nothing is left behind is checked when the test ends.
func (e *env) oneClearError(r result, want ...string) {
	e.Helper()
	if r.code == 0 || r.stdout != "" {
		e.Fatalf("%v, want a failure", r)
	}
	if len(lines(r.stderr)) != 1 {
		e.Errorf("error of %d lines:\n%s", len(lines(r.stderr)), r.stderr)
	}
	for _, text := range want {
		if !strings.Contains(r.stderr, text) {
			e.Errorf("error lacks %q: %s", text, r.stderr)
		}
	}
}

// configure changes Husk's configuration for what starts from now on.
func (e *env) configure(over daemon.Settings) {
	e.Helper()
	if err := e.d.Configure(over); err != nil {
		e.Fatal(err)
	}
}

// truncated is a copy of the first half of a file.
func (e *env) truncated(path string) string {
	e.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		e.Fatal(err)
	}
	return e.scratchFile(filepath.Base(path), data[:len(data)/2])
}

// scratchFile is a new file that QEMU, which is nobody, can read.
func (e *env) scratchFile(name string, data []byte) (path string) {
	e.Helper()
	path = filepath.Join(e.d.Dir, name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		e.Fatal(err)
	}
	return path
}

// silentGuest is an image whose init says a word on the console and sleeps.
func (e *env) silentGuest() string {
	e.Helper()
	busybox, err := os.ReadFile(images.BusyboxPath)
	if err != nil {
		e.Fatal(err)
	}
	var image bytes.Buffer
	err = initrd.Write(&image,
		initrd.CharDevice("dev/console", 0o600, 5, 1),
		initrd.File("bin/busybox", 0o755, busybox), initrd.Symlink("bin/sh", "busybox"),
		initrd.File("init", 0o755, []byte("#!/bin/sh\necho this init says no more\nwhile :; do /bin/busybox sleep 1000; done\n")))
	if err != nil {
		e.Fatal(err)
	}
	return e.scratchFile("initrd.img", image.Bytes())
}

func TestSettingThatCannotWork(t *testing.T) {
	guestFile := func(e *env, name string) string { return filepath.Join(e.root, "build", "guest", name) }
	for _, test := range []struct {
		name string
		over func(*env) daemon.Settings
		want []string
	}{
		{"QEMUMissing", func(*env) daemon.Settings {
			return daemon.Settings{"hypervisor": {"path": "/nonexistent/qemu"}}
		}, []string{"/nonexistent/qemu", "hypervisor.path"}},
		{"VirtiofsdMissing", func(*env) daemon.Settings {
			return daemon.Settings{"hypervisor": {"virtiofsd": "/nonexistent/virtiofsd"}}
		}, []string{"/nonexistent/virtiofsd", "hypervisor.virtiofsd"}},
		{"KernelMissing", func(*env) daemon.Settings {
			return daemon.Settings{"guest": {"kernel": "/nonexistent/vmlinuz"}}
		}, []string{"/nonexistent/vmlinuz", "guest.kernel"}},
		{"KernelTruncated", func(e *env) daemon.Settings {
			return daemon.Settings{"guest": {"kernel": e.truncated(guestFile(e, "vmlinuz"))}}
		}, []string{"vmlinuz", "truncated", "guest.kernel"}},
		{"ImageMissing", func(*env) daemon.Settings {
			return daemon.Settings{"guest": {"initrd": "/nonexistent/initrd.img"}}
		}, []string{"/nonexistent/initrd.img", "guest.initrd"}},
		{"ImageTruncated", func(e *env) daemon.Settings {
			return daemon.Settings{"guest": {"initrd": e.truncated(guestFile(e, "initrd.img"))}}
		}, []string{"initrd.img", "truncated", "guest.initrd"}},
		{"UnknownKey", func(*env) daemon.Settings {
			return daemon.Settings{"hypervisor": {"pth": "/usr/bin/qemu"}}
		}, []string{"configuration.toml:", "pth"}},
		{"BadValue", func(*env) daemon.Settings {
			return daemon.Settings{"hypervisor": {"default_vcpus": -1}}
		}, []string{"configuration.toml:", "hypervisor.default_vcpus = -1", "a whole number"}},
		{"NoWayToTheGuest", func(*env) daemon.Settings {
			return daemon.Settings{"hypervisor": {"channels": []string{}}}
		}, []string{"configuration.toml:", "hypervisor.channels", "no way to the guest"}},
		{"KernelPanic", func(*env) daemon.Settings {
			return daemon.Settings{"guest": {"kernel_params": "rdinit=/nonexistent"}}
		}, []string{"kernel has panicked", "VFS: Unable to mount root fs"}},
		{"AgentNeverAnswers", func(e *env) daemon.Settings {
			return daemon.Settings{"guest": {"initrd": e.silentGuest()}, "runtime": {"boot_timeout": "20s"}}
		}, []string{"boot_timeout", "20s", "this init says no more"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachHusk(t, func(e *env) {
				e.configure(test.over(e))
				e.oneClearError(e.sh("echo never"), test.want...)
			})
		})
	}
}

func TestConfigPathOption(t *testing.T) {
	eachHusk(t, func(e *env) {
		path := filepath.Join(e.TempDir(), "other.toml")
		data, err := e.d.Settings(daemon.Settings{"hypervisor": {"machine": "pc"}})
		if err != nil {
			e.Fatal(err)
		}
		e.writeFile(path, data)
		e.oneClearError(e.sh("echo never", "--runtime-config-path", path), "other.toml:", "hypervisor.machine", "q35")
	})
}

func TestKVMDemandedButUnusable(t *testing.T) {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if hasVirtualization(cpu) {
		t.Skip("the CPU here can run KVM")
	}
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"hypervisor": {"accelerator": "kvm"}})
		e.oneClearError(e.sh("echo never"), "hypervisor.accelerator", "KVM is not usable")
	})
}

func TestNoWayToTheGuestOnThisHost(t *testing.T) {
	if _, err := os.Stat("/dev/vhost-vsock"); err == nil {
		t.Skip("there is a /dev/vhost-vsock here")
	}
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"hypervisor": {"channels": []string{"vhost-vsock"}}})
		e.oneClearError(e.sh("echo never"), "no way to the guest", "/dev/vhost-vsock", "hypervisor.channels")
	})
}

func TestContainerThatCannotStart(t *testing.T) {
	for _, test := range []struct {
		name string
		edit func(*specs.Spec)
		want []string
	}{
		{
			"CommandNotFound", func(s *specs.Spec) { s.Process.Args = []string{"nonexistent-command"} },
			[]string{"nonexistent-command", "not found"},
		},
		{
			"CommandNotExecutable", func(s *specs.Spec) { s.Process.Args = []string{"/etc/not-executable"} },
			[]string{"/etc/not-executable", "ermission denied"},
		},
		{
			"CwdIsNoDirectory", func(s *specs.Spec) { s.Process.Cwd = "/etc/passwd" },
			[]string{"/etc/passwd", "ot a directory"},
		},
		{
			"RootfsMissing", func(s *specs.Spec) { s.Root.Path = "/nonexistent/rootfs" },
			[]string{"/nonexistent/rootfs"},
		},
		{"BindSourceMissing", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/nonexistent/source", Destination: "/mnt", Options: []string{"rbind"}})
		}, []string{"/nonexistent/source"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			each(t, func(e *env) {
				e.oneClearError(e.runSpec("echo never", test.edit), test.want...)
			})
		})
	}
}

func TestFieldThatTheGuestCannotHonour(t *testing.T) {
	eachHusk(t, func(e *env) {
		r := e.runSpec("echo never", func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "gold"} })
		e.oneClearError(r, "linux.intelRdt")
	})
}

func TestUnknownUser(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("user", "sleep 1000")
		r := e.ctr("task", "exec", "--fifo-dir", e.d.FIFODir(), "--exec-id", "user", "--user", "nosuchuser", id, "id")
		e.oneClearError(r, "no users found")
	})
}

func TestExecThatCannotStart(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("exec", "sleep 1000")
		e.oneClearError(e.exec(id, "missing", "nonexistent-command"), "nonexistent-command", "not found")
		e.oneClearError(e.exec(id, "mode", "/etc/not-executable"), "/etc/not-executable", "ermission denied")
		if r := e.exec(id, "after", "echo", "alive"); r.stdout != "alive\n" {
			e.Errorf("container after execs that failed: %v", r)
		}
	})
}
