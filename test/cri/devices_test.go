package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// device has a container use one of the host's, as a device plugin's answer has it.
func device(path string) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) {
		c.Devices = append(c.Devices, &runtime.Device{HostPath: path, ContainerPath: path, Permissions: "rwm"})
	}
}

func TestDevicesAreTheGuests(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("devices", privilegedPod)
		a := p.start("a", idle, e.probe(), with(rw("/dev/null", "/mnt/null"), ro("/dev/zero", "/mnt/zero"), rw("/dev/fuse", "/mnt/fuse")), device("/dev/fuse"),
			func(c *runtime.ContainerConfig) {
				c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
			})
		a.want("stat -c '%F %t:%T' /mnt/null /mnt/zero /mnt/fuse; echo > /mnt/null; head -c 4 /mnt/zero | od -An -tx1",
			"character special file 1:3\ncharacter special file 1:5\ncharacter special file a:e5\n 00 00 00 00")
		for _, path := range []string{"/dev/fuse", "/mnt/fuse"} {
			a.want("mkdir -p /tmp/fs; /probe fuse "+path+" /tmp/fs", "greeted")
		}
		// Privileged: all devices that are there, but for containerd 1.6 those it is given.
		given := func(*runtime.ContainerConfig) {}
		if e.generation == "1.6" {
			given = device("/dev/net/tun")
		}
		b := p.start("b", idle, e.probe(), privileged, given, with(rw("/dev/net/tun", "/mnt/tun"), rw("/dev", "/guest")))
		b.want("tunctl -f /mnt/tun -t probe0 >/dev/null && ip link show probe0 | head -n 1 | grep -o 'probe0:' && tunctl -f /mnt/tun -d probe0 > /dev/null", "probe0:")
		if e.generation != "1.6" {
			b.want("mkdir -p /tmp/fs; /probe fuse /guest/fuse /tmp/fs", "greeted")
		}
		b.want("stat -c %t:%T /guest/null; echo > /guest/null", "1:3")
		// Another container is not allowed what nobody gave it.
		c := p.start("c", idle, e.probe(), with(rw("/dev/fuse", "/mnt/fuse")))
		if r := c.exec("/probe fuse /mnt/fuse /tmp"); r.code == 0 || !strings.Contains(r.stderr, "not permitted") {
			e.Errorf("use of a device that is only mounted: %v", r)
		}
		if e.isHusk() {
			for _, name := range []string{"kvm", "loop0"} {
				if _, err := os.Stat("/dev/" + name); err == nil {
					b.want("test ! -e /guest/"+name+" && echo none", "none")
				}
			}
		}
	})
}

// TestWhatAGuestCannotHaveIsRefused names what it is, and harms nobody.
func TestWhatAGuestCannotHaveIsRefused(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		k := e.kubelet("refused")
		dir := k.hostPath("dir")
		make := func(name string, mode uint32, device uint64) string {
			path := filepath.Join(dir, name)
			k.must(unix.Mknod(path, mode|0o666, int(device)))
			return path
		}
		p := e.run("refused")
		a := p.start("a", idle)
		for path, words := range map[string][]string{
			make("disk", unix.S_IFBLK, unix.Mkdev(7, 0)):      {"block device 7:0"},
			make("strange", unix.S_IFCHR, unix.Mkdev(195, 0)): {"character device 195:0"},
			make("fifo", unix.S_IFIFO, 0):                     {"fifo"},
			"/proc":                                           {"/proc", "proc file system"},
		} {
			p.wantRefused(append(words, path, "(/mnt/refused)"), with(rw(dir, "/mnt/other"), rw(path, "/mnt/refused")))
		}
		a.running()
		a.want("echo here", "here")
		p.start("b", idle, with(rw(dir, "/mnt/other"))).running()
	})
}

// TestMountsThatCannotBeMadeAreOneError each, and harm nobody.
func TestMountsThatCannotBeMadeAreOneError(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("bad")
		dir, closed := k.hostPath("dir"), k.hostPath("closed")
		file := k.file(dir, "f", "precious\n", 0o644)
		memory := k.memory("memory", 1<<20)
		p := e.run("bad")
		a := p.start("a", idle, with(rw(dir, "/dir"), rw(memory, "/memory")))
		a.sh("echo kept > /memory/kept")

		// CRI makes a directory where nothing is: these go after it has looked.
		late := func(name string, spoil func(path string), words ...string) {
			path := filepath.Join(dir, name)
			k.must(os.Mkdir(path, 0o755))
			c, err := p.tryCreate(name, idle, with(rw(dir, "/dir"), rw(path, "/mnt/late")))
			k.must(err)
			spoil(path)
			ctx, cancel := e.call()
			defer cancel()
			_, err = e.cri.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.id})
			if e.isHusk() {
				words = append(words, path, "(/mnt/late)")
			}
			p.wantReason(c, err, words...)
		}
		late("gone", func(path string) { k.must(os.Remove(path)) })
		late("loop", func(path string) {
			k.must(os.Remove(path))
			k.must(os.Symlink("loop", path))
		}, "symbolic link")

		p.wantRefused([]string{"not a directory"}, with(rw(file, "/etc")))
		p.wantRefused([]string{"not a directory"}, with(rw(dir, "/etc/passwd")))
		p.wantRefused([]string{"ot a directory"}, with(rw(dir, "/etc/passwd/below")))
		p.wantRefused([]string{"ead-only file system"}, with(ro(closed, "/closed"), rw(dir, "/closed/below")))
		p.wantRefused([]string{"ead-only file system"}, with(ro(closed, "/closed"), rw(memory, "/closed/memory")))

		a.running()
		a.want("cat /dir/f /memory/kept", "precious\nkept")
		b := p.start("b", idle, with(rw(dir, "/dir"), ro(closed, "/closed"), rw(memory, "/memory")))
		b.want("cat /dir/f /memory/kept; ls -A /closed", "precious\nkept")
	})
}
