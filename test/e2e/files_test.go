package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/images"
)

// baseline is the runtime whose containers Husk's are to be like.
const baseline = "io.containerd.runc.v2"

// A difference is what a file system in a container of Husk's does otherwise than
// under the baseline, and why that is not to be helped.
type difference struct {
	// where are the directories, and what the properties and what was tried of
	// them, as regular expressions of the words that fsprobe prints.
	where, what string
	// husk is in the result: all of them under Husk have it.
	husk string
	why  string
	// from is the host's kernel from which on there is a difference.
	from kernel
}

// shared are the directories that the guest has by virtio-fs.
const shared = "bind|rootfs|volume"

// differences are also in docs/limits.md, but for those of no account.
var differences = []difference{
	{shared, `acl (get.*|set.*|inherited)`, "ENOTSUP", "POSIX ACLs would be stored, and not enforced", kernel{}},
	{shared, `acl mode`, " 100644 ", "as the ACL was not set", kernel{}},
	{"bind|rootfs", `privileged-xattr (set|remove) .*`, "EPERM", "virtiofsd would need CAP_SYS_ADMIN", kernel{}},
	{"bind|rootfs", `privileged-xattr get .*`, "ENODATA", "as it was not set", kernel{}},
	{shared, `tmpfile open`, "ENOTSUP", "FUSE has O_TMPFILE from Linux 6.2 on, virtiofsd not at all", kernel{6, 2}},
	{shared, `tmpfile (write|link|file)`, nothing, "as there is no file", kernel{6, 2}},
	{shared, `fallocate (COLLAPSE|INSERT)_RANGE`, "ENOTSUP", "FUSE knows neither", kernel{}},
	{
		"bind|rootfs", `setid 2767 after (write|truncate) by another user`, " 102767 ",
		"virtiofsd, by whose hand it is, is of the file's group; a set-group-ID bit with the group's execution does go",
		kernel{6, 2},
	},
	{"volume", `rename-flags WHITEOUT`, " 20000 0:", "virtiofsd makes the whiteout, as root", kernel{}},
	{shared, `statfs type`, "fuse", "it is one", kernel{}},
	{"rootfs", `open name_to_handle_at`, "ok", "overlayfs has no handles, FUSE has its own", kernel{}},
	{
		"tmpfs|own", `xattr (set|get|create again|replace.*|empty value|1000 bytes|longest name|name of odd bytes|get .*|remove.*|of a directory|through a symbolic link|of an unlinked file)`,
		"ENOTSUP", "a tmpfs has user.* from Linux 6.6 on, and the guest's kernel is 6.1",
		kernel{6, 6},
	},
	{"tmpfs|own", `xattr list`, ` "" `, "as there are none", kernel{6, 6}},
	{"tmpfs|own", `direct open`, "EINVAL", "a tmpfs has O_DIRECT from Linux 6.6 on", kernel{6, 6}},
	{"tmpfs|own", `direct (read|write) .*`, nothing, "as it was not opened", kernel{6, 6}},
}

// nothing stands for a result that was not printed.
const nothing = " nothing "

// A kernel is a version of Linux, major and minor.
type kernel [2]int

// hostKernel is the one that runs the baseline's containers.
func hostKernel(t *testing.T) (k kernel) {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &k[0], &k[1]); err != nil {
		t.Fatalf("kernel's release: %v", err)
	}
	return k
}

// listed returns the differences that are to be found in a directory, with which
// kernel there is on the host.
func listed(host kernel, where, what string) []difference {
	return slices.DeleteFunc(slices.Clone(differences), func(d difference) bool {
		return slices.Compare(host[:], d.from[:]) < 0 || !matches(d.where, where) || !matches(d.what, what)
	})
}

func matches(pattern, text string) bool {
	return regexp.MustCompile("^(?:" + pattern + ")$").MatchString(text)
}

// onNewest is each for what does not depend on containerd: with the newest alone.
func onNewest(t *testing.T, test func(e *env)) {
	t.Helper()
	t.Parallel()
	root := repository(t)
	g := generations(t, root)
	t.Run("containerd-"+g[len(g)-1].Name, func(t *testing.T) {
		test(newEnv(t, root, g[len(g)-1]))
	})
}

// program builds a test program, for the host and for containers alike, and returns
// the directory that it is alone in.
func (e *env) program(name string) (dir string) {
	e.Helper()
	dir = e.TempDir()
	build := exec.CommandContext(e.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "./test/"+name)
	build.Dir = e.root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		e.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return dir
}

// onHost is what a test program prints when it runs on the host.
func (e *env) onHost(program string, args ...string) string {
	e.Helper()
	out, err := exec.CommandContext(e.Context(), program, args...).CombinedOutput()
	if err != nil {
		e.Errorf("%s %s on the host: %v\n%.4000s", filepath.Base(program), strings.Join(args, " "), err, out)
	}
	return string(out)
}

// bind is ctr's flag for a bind mount.
func bind(src, dst, options string) []string {
	return []string{"--mount", fmt.Sprintf("type=bind,src=%s,dst=%s,options=rbind:%s", src, dst, options)}
}

// A probed is what fsprobe did under one runtime.
type probed struct {
	tried string
	host  string // the directory of the host that it wrote to
	// seen is what it printed of the host's own files.
	seen string
}

// runningUnder starts a container that does nothing, with more arguments of ctr run.
func (e *env) runningUnder(runtime, name string, args ...string) (id string) {
	e.Helper()
	id = e.d.ID(name)
	args = append([]string{"run", "--runtime", runtime, "--fifo-dir", e.d.FIFODir(), "-d", "--null-io"}, args...)
	if !slices.Contains(args, "--config") {
		args = append(args, images.Busybox, id, "sleep", "100000")
	} else {
		args = append(args, id)
	}
	e.must(args...)
	return id
}

// fsprobe runs the program in a container: once for each of the directories, so that
// the limit of a command is that of one.
func (e *env) fsprobe(id string, dirs ...string) (output string) {
	e.Helper()
	for _, dir := range dirs {
		r := e.exec(id, filepath.Base(dir), "/probe/fsprobe", dir)
		if r.code != 0 || r.stderr != "" {
			e.Errorf("fsprobe %s in %s: %v", dir, id, r)
		}
		output += r.stdout
	}
	return output
}

// probeAsRoot runs fsprobe on a bind of the host, the rootfs and a tmpfs.
func (e *env) probeAsRoot(runtime, name, probe, files string) probed {
	e.Helper()
	host := e.TempDir()
	args := []string{"--cap-add", "CAP_SYS_ADMIN", "--mount", "type=tmpfs,src=tmpfs,dst=/mnt/tmpfs,options=rw"}
	args = append(args, bind(probe, "/probe", "ro")...)
	args = append(args, bind(files, "/mnt/files", "ro")...)
	args = append(args, bind(host, "/mnt/bind", "rw")...)
	id := e.runningUnder(runtime, name, args...)
	if r := e.exec(id, "mkdir", "mkdir", "/rootfs"); r.code != 0 {
		e.Fatalf("mkdir: %v", r)
	}
	seen := e.exec(id, "show", "/probe/fsprobe", "show", "-times", "/mnt/files")
	return probed{e.fsprobe(id, "/mnt/bind", "/rootfs", "/mnt/tmpfs"), host, seen.stdout + seen.stderr}
}

// probeAsUser runs fsprobe as a user that may write to a volume by an fsGroup, as
// the kubelet prepares it, and on a tmpfs.
func (e *env) probeAsUser(runtime, name, probe string) probed {
	e.Helper()
	const user, group, fsGroup = 1000, 1000, 2000
	host := e.TempDir()
	if err := os.Chown(host, -1, fsGroup); err != nil {
		e.Fatal(err)
	}
	if err := os.Chmod(host, 0o775|os.ModeSetgid); err != nil {
		e.Fatal(err)
	}
	config := e.spec(func(s *specs.Spec) {
		s.Process.Args = []string{"sleep", "100000"}
		s.Process.User = specs.User{UID: user, GID: group, AdditionalGids: []uint32{fsGroup}}
		s.Mounts = append(s.Mounts,
			specs.Mount{Type: "bind", Source: probe, Destination: "/probe", Options: []string{"rbind", "ro"}},
			specs.Mount{Type: "bind", Source: host, Destination: "/mnt/volume", Options: []string{"rbind"}},
			specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/mnt/own", Options: []string{"mode=1777"}})
	})
	id := e.runningUnder(runtime, name, "--config", config)
	return probed{tried: e.fsprobe(id, "/mnt/volume", "/mnt/own"), host: host}
}

// TestFiles has one program try the same in containers of Husk and of the
// baseline. What comes of it, and what is then on the host, is to be the same.
func TestFiles(t *testing.T) {
	onNewest(t, func(e *env) {
		probe, files := e.program("fsprobe"), e.TempDir()
		e.populate(files)
		want := e.onHost(filepath.Join(probe, "fsprobe"), "show", "-times", files)
		root, user := e.probeAsRoot(baseline, "root", probe, files), e.probeAsUser(baseline, "user", probe)
		huskRoot, huskUser := e.probeAsRoot(*runtimeFlag, "tested-root", probe, files), e.probeAsUser(*runtimeFlag, "tested-user", probe)
		for _, p := range []probed{root, huskRoot} {
			if got, at := lines(p.seen), lines(want); !slices.Equal(got, at) {
				e.Errorf("files of the host, as seen in the container:\n%s\nand on the host:\n%s", p.seen, want)
			}
		}
		e.compareEach(root.tried, huskRoot.tried)
		e.compareEach(user.tried, huskUser.tried)
		e.compareHost("bind", probe, root.host, huskRoot.host)
		e.compareHost("volume", probe, user.host, huskUser.host)
	})
}

// populate makes files of all kinds on the host.
func (e *env) populate(dir string) {
	e.Helper()
	script := `set -e; cd "$1"
		mkdir -m 2775 shared; chgrp 2000 shared; mkdir -m 1777 tmp; mkdir -p a/b/c
		echo text > file; chmod 4755 file; chown 1234:4321 file; ln file a/b/link; ln -s file symlink; ln -s nowhere dangling
		echo secret > secret; chmod 000 secret; mkfifo -m 640 fifo; mknod -m 622 null c 1 3; mknod -m 640 loop b 7 99
		truncate -s 8G sparse; printf end | dd of=sparse bs=1 seek=8589934580 conv=notrunc 2>/dev/null
		touch -d '2001-02-03 04:05:06.789012345' a/b; touch -h -d '1969-12-31 23:59:58.5' symlink
		touch "$(printf 'odd\001\377 \nname')" "$(head -c 255 /dev/zero | tr '\0' n)"`
	if out, err := exec.CommandContext(e.Context(), "sh", "-c", script, "sh", dir).CombinedOutput(); err != nil {
		e.Fatalf("make files: %v\n%s", err, out)
	}
	for name, value := range map[string]string{"user.comment": "value \x00\xff", "security.capability": "\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14)} {
		if err := unix.Setxattr(filepath.Join(dir, "a/b/link"), name, []byte(value), 0); err != nil {
			e.Fatalf("set %s: %v", name, err)
		}
	}
}

// A verdict is what was tried, in words "bind/rename over an open file", and what
// came of it.
type verdict struct{ where, property, what, result string }

// verdicts takes apart what fsprobe printed.
func (e *env) verdicts(output string) (list []verdict) {
	e.Helper()
	for _, line := range lines(output) {
		left, result, ok := strings.Cut(line, ": ")
		where, words, ok2 := strings.Cut(left, "/")
		property, what, ok3 := strings.Cut(words, " ")
		if !ok || !ok2 || !ok3 {
			e.Errorf("line of fsprobe: %q", line)
			continue
		}
		list = append(list, verdict{where, property, what, result})
	}
	return list
}

// compareEach has a test for each property.
func (e *env) compareEach(want, got string) {
	e.Helper()
	type key struct{ where, property string }
	var keys []key
	all := map[key][2][]verdict{}
	for side, output := range []string{want, got} {
		for _, v := range e.verdicts(output) {
			k := key{v.where, v.property}
			if _, ok := all[k]; !ok {
				keys = append(keys, k)
			}
			both := all[k]
			both[side] = append(both[side], v)
			all[k] = both
		}
	}
	if len(keys) == 0 {
		e.Error("fsprobe tried nothing")
	}
	for _, k := range keys {
		e.Run(k.where+"/"+k.property, func(t *testing.T) { compareProperty(t, k.where, k.property, all[k]) })
	}
}

// compareProperty finds what differs, which is to be what is listed.
func compareProperty(t *testing.T, where, property string, both [2][]verdict) {
	t.Helper()
	host := hostKernel(t)
	results := [2]map[string]string{{}, {}}
	var order []string
	for side, list := range both {
		for _, v := range list {
			words := property + " " + v.what
			if _, ok := results[0][words]; !ok && !slices.Contains(order, words) {
				order = append(order, words)
			}
			results[side][words] += " " + v.result + " " // of several with one name, all
		}
	}
	for _, words := range order {
		want, got := results[0][words], results[1][words]
		if want == "" {
			want = nothing
		}
		if got == "" {
			got = nothing
		}
		var known []difference
		if strings.Contains(*runtimeFlag, "husk") {
			known = listed(host, where, words)
		}
		switch {
		case want == got && len(known) > 0:
			t.Errorf("%s:%sunder both, though it is listed as a difference: %s", words, want, known[0].why)
		case want != got && !slices.ContainsFunc(known, func(d difference) bool { return strings.Contains(got, d.husk) }):
			t.Errorf("%s:%s, and under the baseline%s", words, got, want)
		}
	}
}

// compareHost compares what is on the host after the same was done under both
// runtimes, but for the properties of which differences are listed.
func (e *env) compareHost(where, probe, want, got string) {
	e.Helper()
	host := hostKernel(e.T)
	left := func(dir string) (list []string) {
		for _, line := range lines(e.onHost(filepath.Join(probe, "fsprobe"), "show", dir)) {
			property, _, _ := strings.Cut(strings.TrimPrefix(line, `"`), "/")
			differs := slices.ContainsFunc(differences, func(d difference) bool {
				return slices.Compare(host[:], d.from[:]) >= 0 && matches(d.where, where) && strings.HasPrefix(d.what, property+" ")
			})
			if !differs {
				list = append(list, line)
			}
		}
		return list
	}
	a, b := left(want), left(got)
	if len(a) < 100 {
		e.Errorf("%d files are left in %s", len(a), where)
	}
	for _, line := range a {
		if !slices.Contains(b, line) {
			e.Errorf("after the baseline, not after Husk, there is in %s: %s", where, line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			e.Errorf("after Husk, not after the baseline, there is in %s: %s", where, line)
		}
	}
}
