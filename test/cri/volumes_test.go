package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestHostPathIsLiveInBothDirections(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("live")
		dir, beside := k.hostPath("dir"), k.hostPath("beside")
		file := k.file(beside, "mounted", "from the host\n", 0o666)
		k.file(beside, "secretive", "not mounted\n", 0o666)
		k.must(os.MkdirAll(filepath.Join(dir, "sub"), 0o750))
		k.must(os.Symlink("sub/f", filepath.Join(dir, "link")))
		k.file(dir, "sub/f", "there before\n", 0o640)
		p := e.run("live", privilegedPod)
		a := p.start("a", idle, e.probe(), with(rw(dir, "/dir"), rw(file, "/data/mounted"), ro(dir, "/ro"), ro(file, "/data/ro")))
		b := p.start("b", idle, e.probe(), with(rw(dir, "/dir")), privileged)
		a.wantTree([]string{dir, dir}, []string{"/dir", "/ro"})

		a.sh("echo by a > /dir/new; echo appended >> /data/mounted; mv /dir/sub/f /dir/sub/g; ln /dir/sub/g /dir/hard; rm /dir/link; mkfifo /dir/fifo")
		b.want("cat /dir/new /dir/hard", "by a\nthere before")
		a.want("cat /ro/new /data/ro", "by a\nfrom the host\nappended")
		if got, want := e.tree(dir), a.sh("/probe tree /dir"); got != want {
			e.Errorf("on the host:\n%s\nin the container:\n%s", got, want)
		}
		if got := e.hostRead(file); got != "from the host\nappended\n" {
			e.Errorf("the file on the host is %q", got)
		}

		k.file(dir, "later", "by the host\n", 0o600)
		k.file(beside, "mounted", "written again\n", 0o666)
		k.must(os.RemoveAll(filepath.Join(dir, "sub")))
		for _, c := range []*container{a, b} {
			c.eventuallyTree([]string{dir}, []string{"/dir"})
		}
		a.eventually("cat /data/mounted /data/ro /ro/later", "written again\nwritten again\nby the host")

		if r := a.exec("echo > /ro/x; echo > /ro/later; rm /ro/later; echo > /data/ro"); r.code == 0 || strings.Count(r.stderr, "Read-only") != 4 {
			e.Errorf("write to what is read-only: %v", r)
		}
		// A file comes alone, even for those who mount what the guest has.
		a.want("ls -A /data", "mounted\nro")
		if e.isHusk() {
			_, tag, _ := strings.Cut(strings.Join(e.machine(p).Args, " "), ",tag=")
			tag, _, _ = strings.Cut(strings.Fields(tag)[0], ",")
			b.sh("mkdir /share && mount -t virtiofs " + tag + " /share")
			if got := b.sh("find /share | grep -e secretive -e mounted; umount /share"); got != "" {
				e.Errorf("the guest has %s", got)
			}
		}
	})
}

// TestMountsBelowAHostPath is what read-only and propagation mean for them.
func TestMountsBelowAHostPath(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("below")
		dir := k.hostPath("dir")
		k.share(dir)
		below := func(name, text string) string {
			target := filepath.Join(dir, name)
			k.must(os.MkdirAll(target, 0o755))
			k.mount("tmpfs", target, "tmpfs", 0, "size=1M")
			k.file(target, "f", text, 0o644)
			return target
		}
		below("before", "before\n")
		follows := func(m *runtime.Mount) *runtime.Mount {
			m.Propagation = runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
			return m
		}
		mounts := []*runtime.Mount{rw(dir, "/rw"), ro(dir, "/ro"), follows(rw(dir, "/follows")), follows(ro(dir, "/follows-ro"))}
		recursive := e.generation != "1.6" // whose CRI does not know it
		if recursive {
			m := ro(dir, "/rro")
			m.RecursiveReadOnly = true
			mounts = append(mounts, m)
		}
		p := e.run("below")
		a := p.start("a", idle, with(mounts...))
		for _, m := range mounts {
			a.want("cat "+m.ContainerPath+"/before/f", "before")
		}
		// Read-only is a matter of the mount itself alone, unless it is recursive.
		a.sh("echo > /rw/x; echo > /rw/before/rw; echo > /ro/before/ro; echo > /follows/before/follows; echo > /follows-ro/before/follows-ro")
		refusals := []string{"/ro/x", "/follows-ro/x"}
		if recursive {
			refusals = append(refusals, "/rro/x", "/rro/before/x")
		}
		for _, path := range refusals {
			if r := a.exec("echo > " + path); r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
				e.Errorf("write to %s: %v", path, r)
			}
		}
		if names, err := filepath.Glob(filepath.Join(dir, "before", "*")); err != nil || len(names) != 5 {
			e.Errorf("the host has %v, %v", names, err)
		}

		// Others than who follows see later mounts' places.
		later := below("later", "later\n")
		for _, at := range []string{"/follows", "/follows-ro"} {
			a.eventually("cat "+at+"/later/f", "later")
		}
		a.sh("echo by the container > /follows/later/g")
		if got := e.hostRead(filepath.Join(later, "g")); got != "by the container\n" {
			e.Errorf("the host has %q", got)
		}
		a.want("ls /rw/later /ro/later", "/ro/later:\n\n/rw/later:")
		k.mount("tmpfs", later, "tmpfs", 0, "size=1M") // on top
		k.file(later, "h", "on top\n", 0o644)
		a.eventually("ls /follows/later", "h")
		k.unmount(later)
		a.eventually("ls /follows/later", "f\ng")
		k.unmount(later)
		a.eventually("ls /follows/later /follows-ro/later", "/follows-ro/later:\n\n/follows/later:")
	})
}

// TestBidirectionalMounts appear on the host by runc, and by husk are an error.
func TestBidirectionalMounts(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("both")
		dir := k.hostPath("dir")
		k.share(dir)
		k.must(os.Mkdir(filepath.Join(dir, "m"), 0o755))
		both := rw(dir, "/dir")
		both.Propagation = runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL
		p := e.run("both", privilegedPod)
		if e.isHusk() {
			sibling := p.start("sibling", idle, with(rw(dir, "/dir")))
			p.wantRefused([]string{"Bidirectional", "(/dir)"}, with(both), privileged)
			sibling.running()
			return
		}
		a := p.start("a", "mount -t tmpfs tmpfs /dir/m && echo mounted > /dir/m/f; "+idle, with(both), privileged)
		e.within(followLimit, "the mount is on the host", func(context.Context) error {
			_, err := os.Stat(filepath.Join(dir, "m", "f"))
			return err
		})
		a.sh("umount /dir/m")
		if _, err := os.Stat(filepath.Join(dir, "m", "f")); !errors.Is(err, fs.ErrNotExist) {
			e.Errorf("the host after the container has unmounted: %v", err)
		}
	})
}

// wantRefused wants a container not to start, for a reason that has the words.
func (p *pod) wantRefused(words []string, edits ...func(*runtime.ContainerConfig)) {
	p.e.Helper()
	c, err := p.tryStart("refused", idle, edits...)
	p.wantReason(c, err, words...)
}

// wantReason wants an error of one line that has the words, and removes the container.
func (p *pod) wantReason(c *container, err error, words ...string) {
	p.e.Helper()
	if c != nil {
		if err == nil {
			c.stop()
		}
		c.remove()
	}
	if err == nil {
		p.e.Errorf("a container started, want an error with %q", words)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			p.e.Errorf("no %q in the error: %v", word, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		p.e.Errorf("the error is not one line: %v", err)
	}
}

// TestSubPaths is of every kind of volume.
func TestSubPaths(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("subpaths")
		host, empty, memory := k.hostPath("dir"), k.emptyDir("empty"), k.memory("memory", 4<<20)
		k.file(host, "file", "a file\n", 0o666)
		maps := k.configMap("map", plain(map[string]string{"key": "of a configMap\n", "dir/key": "deeper\n"}))
		secret := k.secret("secret", "secret", payload{"key": {"of a secret\n", 0o400}})
		token := k.secret("projected", "token", plain(map[string]string{"dir/sub/key": "projected\n"}))
		i := 0
		sub := func(volume, path string) string {
			i++
			return k.subPath(volume, path, "a", i)
		}
		p := e.run("subpaths")
		a := p.start("a", idle, e.probe(), with(
			rw(sub(host, "sub/expr-a"), "/host"), rw(sub(host, "file"), "/etc/file"),
			rw(sub(empty, "sub"), "/empty"), rw(sub(memory, "sub/deep"), "/memory"),
			ro(sub(maps, "key"), "/etc/app/app.conf"), ro(sub(maps, "dir"), "/dir"),
			ro(sub(secret, "key"), "/etc/app/key"), ro(sub(token, "dir/sub"), "/token"), ro(sub(token, "dir/sub/key"), "/etc/app/projected"),
		))
		a.want("cat /etc/file /etc/app/* /dir/key /token/key", "a file\nof a configMap\nof a secret\nprojected\ndeeper\nprojected")
		a.want("stat -c %a /etc/app/key; ls -A /etc/app /dir /token | tr '\\n' ' '", "400\n/dir: key  /etc/app: app.conf key projected  /token: key")
		a.sh("for d in /host /empty /memory; do echo by a > $d/f; done; echo more >> /etc/file")
		for path, want := range map[string]string{host + "/sub/expr-a/f": "by a\n", host + "/file": "a file\nmore\n", empty + "/sub/f": "by a\n"} {
			if got := e.hostRead(path); got != want {
				e.Errorf("%s on the host: %q, want %q", path, got, want)
			}
		}
		// Who mounts the whole volume, or the same part again, finds it there.
		b := p.start("b", idle, with(rw(empty, "/empty"), rw(memory, "/memory"),
			rw(k.subPath(memory, "sub", "b", 1), "/sub"), ro(k.subPath(memory, "sub/deep", "b", 2), "/deep"), rw(k.subPath(memory, "other", "b", 3), "/other")))
		b.want("cat /empty/sub/f /memory/sub/deep/f /sub/deep/f /deep/f", strings.TrimSpace(strings.Repeat("by a\n", 4)))
		b.sh("echo by b > /sub/deep/g; echo by b > /other/h; echo by b > /empty/sub/g")
		a.want("cat /memory/g /empty/g", "by b\nby b")
		b.want("cat /memory/other/h; test ! -e /memory/sub/h && echo apart", "by b\napart")
		if r := b.exec("echo > /deep/x"); r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
			e.Errorf("write to a read-only sub-path: %v", r)
		}
		if r := a.exec("dd if=/dev/zero of=/memory/big bs=1M count=8"); !strings.Contains(r.stderr, "No space left") {
			e.Errorf("write more than the volume's size to a sub-path: %v", r)
		}
	})
}

// TestOwnership is of users and of the group that a pod's volumes belong to.
func TestOwnership(t *testing.T) {
	const uid, gid, group = 1234, 2345, 3456
	each(t, setup{}, func(e *env) {
		k := e.kubelet("owners")
		host, mine := k.hostPath("dir"), k.hostPath("mine")
		k.must(os.Chown(mine, uid, gid))
		k.must(os.Chmod(mine, 0o700))
		k.file(host, "roots", "root's alone\n", 0o600)
		empty, memory := k.emptyDir("empty"), k.memory("memory", 4<<20)
		maps := k.configMap("map", payload{"key": {"text", 0o440}})
		secret := k.secret("secret", "secret", payload{"key": {"text", 0o400}})
		closed := k.secret("secret", "closed", payload{"key": {"text", 0o400}})
		for _, dir := range []string{empty, memory} {
			k.fsGroup(dir, group, false)
		}
		for _, dir := range []string{maps, secret} {
			k.fsGroup(dir, group, true)
		}
		p := e.run("owners")
		mounts := with(rw(host, "/host"), rw(mine, "/mine"), rw(empty, "/empty"), rw(memory, "/memory"), ro(maps, "/map"), ro(secret, "/secret"), ro(closed, "/closed"))
		a := p.start("a", idle, e.probe(), mounts, user(uid, gid, group))
		b := p.start("b", idle, e.probe(), mounts)
		volumes, inside := []string{host, mine, empty, maps, secret, closed}, []string{"/host", "/mine", "/empty", "/map", "/secret", "/closed"}
		b.wantTree(volumes, inside)
		a.want("stat -c '%a %u:%g' /empty /memory", "2777 0:3456\n3777 0:3456")
		a.want("cat /map/key /secret/key", "texttext")
		if r := a.exec("cat /closed/key; cat /host/roots; chown 0 /mine"); r.code == 0 || strings.Count(r.stderr, "denied") != 2 || !strings.Contains(r.stderr, "not permitted") {
			e.Errorf("a user did what only root may: %v", r)
		}
		a.sh("umask 027; for d in /host /mine /empty /memory; do echo by a > $d/f; mkdir $d/d; ln -s f $d/l; done; chgrp 3456 /mine/f; chmod 4711 /host/f")
		b.want("stat -c '%a %u:%g' /host/f /mine/f /empty/f /empty/d /memory/f /memory/d",
			"4711 1234:2345\n640 1234:3456\n640 1234:3456\n2750 1234:3456\n640 1234:3456\n2750 1234:3456")
		b.wantTree(volumes, inside)
		// What root and the host own then is seen by the user.
		b.sh("echo by b > /host/b; chown 1234:3456 /host/b; chmod 600 /host/b; chown -h 7:8 /host/l")
		k.must(os.Chown(k.file(empty, "hosts", "by the host\n", 0o600), uid, gid))
		a.eventually("cat /host/b /empty/hosts; stat -c %u:%g /empty/hosts /host/l", "by b\nby the host\n1234:2345\n7:8")
		if got, want := e.tree(volumes...), b.sh("/probe tree "+strings.Join(inside, " ")); got != want {
			e.Errorf("on the host:\n%s\nin the container:\n%s", got, want)
		}
		if e.isHusk() { // it is the guest's
			return
		}
		if got := fmt.Sprint(e.tree(memory)); !strings.Contains(got, "f 100640 1234:3456") {
			e.Errorf("memory on the host:\n%s", got)
		}
	})
}
