package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// files has a container mount what a kubelet makes for each: hosts, and a termination
// log at a path of its choice, which is returned.
func (k *kubelet) files(container, at string) (log string, edit func(*runtime.ContainerConfig)) {
	k.e.Helper()
	log = k.file(k.path("containers", container), "0badcafe", "", 0o666)
	hosts := filepath.Join(k.dir, "etc-hosts")
	if _, err := os.Stat(hosts); err != nil {
		k.file(k.dir, "etc-hosts", "127.0.0.1 localhost\n192.0.2.9 example.test\n", 0o644)
	}
	return log, func(c *runtime.ContainerConfig) {
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": at}
		with(rw(hosts, "/etc/hosts"), rw(log, at))(c)
	}
}

const terminationPath = "/dev/termination-log"

func TestFilesOfEachPod(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("files")
		p := e.run("files")
		_, fa := k.files("a", terminationPath)
		_, fb := k.files("b", terminationPath)
		a := p.start("a", idle, fa)
		b := p.start("b", idle, fb, func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true })
		const stat = "stat -c '%n %F %a %u:%g' /etc/hosts /etc/hostname /etc/resolv.conf " + terminationPath
		const want = "/etc/hosts regular file 644 0:0\n/etc/hostname regular file 644 0:0\n/etc/resolv.conf regular file 644 0:0\n" + terminationPath + " regular empty file 666 0:0"
		for _, c := range []*container{a, b} {
			c.want(stat, want)
			c.want("cat /etc/hostname; grep ^nameserver /etc/resolv.conf; grep example /etc/hosts", "files\nnameserver 192.0.2.53\n192.0.2.9 example.test")
		}
		// They are written to where runc lets them be, and are the pod's.
		a.sh("echo 192.0.2.10 added.test >> /etc/hosts; echo search added.test >> /etc/resolv.conf; echo renamed > /etc/hostname")
		for _, c := range []*container{a, b} {
			c.want("grep added /etc/hosts /etc/resolv.conf; cat /etc/hostname", "/etc/hosts:192.0.2.10 added.test\n/etc/resolv.conf:search added.test\nrenamed")
		}
		// The host writes it again, in place.
		k.file(k.dir, "etc-hosts", "192.0.2.11 later.test\n", 0o644)
		for _, c := range []*container{a, b} {
			c.eventually("cat /etc/hosts", "192.0.2.11 later.test")
		}
		if r := b.exec("echo > /etc/hostname; echo > /etc/resolv.conf"); r.code == 0 || strings.Count(r.stderr, "Read-only") != 2 {
			e.Errorf("write to files of a read-only root: %v", r)
		}
		a.sh("echo replaced > /tmp/x; ! mv /tmp/x /etc/hosts 2>/dev/null")
	})
}

// TestTerminationLogIsOnTheHostBeforeTheExitIsTold reads it as a kubelet does.
func TestTerminationLogIsOnTheHostBeforeTheExitIsTold(t *testing.T) {
	const most = 4096 // of which a kubelet reads
	each(t, setup{}, func(e *env) {
		k := e.kubelet("last")
		p := e.run("last")
		a := p.start("a", idle)
		for name, tt := range map[string]struct{ at, script, want string }{
			"usual":    {terminationPath, "echo last words > " + terminationPath, "last words\n"},
			"another":  {"/var/words", "echo other words > /var/words", "other words\n"},
			"appended": {terminationPath, "for i in 1 2 3; do echo $i >> " + terminationPath + "; done; exit 3", "1\n2\n3\n"},
			"none":     {terminationPath, "true", ""},
			"long":     {terminationPath, fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x > %s", most, terminationPath), strings.Repeat("x", most)},
			"killed":   {terminationPath, "echo to be killed > " + terminationPath + "; kill -9 $$", "to be killed\n"},
		} {
			log, edit := k.files(name, tt.at)
			c := p.start(name, tt.script, edit)
			for c.status().State != runtime.ContainerState_CONTAINER_EXITED { // no time is given between the two
			}
			if got := e.hostRead(log); got != tt.want {
				e.Errorf("%s: the log is %.100q, want %.100q", name, got, tt.want)
			}
			c.remove()
		}
		// As long as the container lives it may be read, too: it is for kubectl describe.
		log, edit := k.files("stopped", terminationPath)
		c := p.start("stopped", "echo up > "+terminationPath+"; echo up; "+idle, edit)
		c.waitOutput("up\n")
		c.stop()
		if got := e.hostRead(log); got != "up\n" {
			e.Errorf("the log of a container that was stopped is %q", got)
		}
		a.want("echo here", "here")
	})
}

// ignoreMissing is for what goes while a directory is read.
func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// TestFilesOfTheHostDoNotGrow where a container writes without end to what it was given.
func TestFilesOfTheHostDoNotGrow(t *testing.T) {
	const written, limit = 100, 1 << 20
	each(t, setup{husk: true}, func(e *env) {
		k := e.kubelet("flood")
		p := e.run("flood")
		sibling := p.start("sibling", idle)
		log, edit := k.files("flood", terminationPath)
		a := p.start("flood", "", edit, func(c *runtime.ContainerConfig) {
			c.Command = []string{"sh", "-c", fmt.Sprintf("for f in /etc/hosts /etc/resolv.conf /etc/hostname %s; do dd if=/dev/zero of=$f bs=1M count=%d; done; true", terminationPath, written)}
		})
		a.exited()
		// Wherever containerd has its own, all that is large is a file of these.
		k.must(filepath.WalkDir(e.d.Dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return ignoreMissing(err)
			}
			info, err := entry.Info()
			if err == nil && (info.Size() > written<<20/2 || info.Size() > limit && (path == log || path == filepath.Join(k.dir, "etc-hosts"))) {
				e.Errorf("%s on the host has %d bytes after a flood", path, info.Size())
			}
			return ignoreMissing(err)
		}))
		a.remove()
		sibling.running()
		sibling.want("echo here", "here")
		p.start("next", "cat /etc/hostname").exited()
	})
}
