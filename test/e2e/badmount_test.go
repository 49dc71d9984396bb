package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostFiles makes what the mounts below are of.
func (e *env) hostFiles() (dir string) {
	e.Helper()
	dir = e.TempDir()
	e.writeFile(filepath.Join(dir, "file"), []byte("text\n"))
	for link, target := range map[string]string{"loop": "loop", "dangling": "nowhere", "through": "file/x"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			e.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "dir"), 0o755); err != nil {
		e.Fatal(err)
	}
	return dir
}

// bindMount is a bind of a name in dir.
func bindMount(dir, name, dst string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: filepath.Join(dir, name), Destination: dst, Options: append([]string{"rbind"}, options...)}
}

// TestMountThatCannotBe wants one line that names the mount, no matter whether the
// host or the guest finds out, and the pod as it was.
func TestMountThatCannotBe(t *testing.T) {
	onNewestWithSandboxes(t, func(p *pod) {
		dir := p.hostFiles()
		p.run("")
		sibling := p.startSh("sibling", "echo ready; sleep 1000", append(bind(dir, "/mnt/host", "rw"), "--sandbox", p.id)...)
		sibling.expect("ready")
		for _, test := range []struct {
			name   string
			mounts []specs.Mount
			want   []string
		}{
			{"SourceMissing", []specs.Mount{bindMount(dir, "none", "/mnt")}, []string{"(/mnt)", "/none", "not exist"}},
			{"SourceALoop", []specs.Mount{bindMount(dir, "loop", "/mnt")}, []string{"(/mnt)", "/loop", "is a loop of symbolic links"}},
			{"SourceDangling", []specs.Mount{bindMount(dir, "dangling", "/mnt")}, []string{"(/mnt)", "/dangling", "not exist"}},
			{"SourceBelowAFile", []specs.Mount{bindMount(dir, "through", "/mnt")}, []string{"(/mnt)", "/through", "not a directory"}},
			{"FileOnADirectory", []specs.Mount{bindMount(dir, "file", "/etc")}, []string{`mount on "/etc": not a directory`}},
			{"DirectoryOnAFile", []specs.Mount{bindMount(dir, "dir", "/etc/passwd")}, []string{`mount on "/etc/passwd": not a directory`}},
			{"DestinationBelowAFile", []specs.Mount{bindMount(dir, "dir", "/etc/passwd/below")}, []string{"/etc/passwd/below", "ot a directory"}},
			{"DestinationInAReadOnlyMount", []specs.Mount{
				bindMount(dir, "dir", "/mnt", "ro"), bindMount(dir, "dir", "/mnt/below"),
			}, []string{"/mnt/below", "ead-only file system"}},
			{"OptionUnknown", []specs.Mount{{Type: "tmpfs", Source: "tmpfs", Destination: "/mnt", Options: []string{"nonsense=1"}}}, []string{`mount on "/mnt": invalid argument`}},
		} {
			config := p.spec(func(s *specs.Spec) {
				s.Process.Args = []string{"echo", "never"}
				s.Mounts = append(s.Mounts, test.mounts...)
			})
			p.Run(test.name, func(t *testing.T) {
				in := *p.env
				in.T = t
				in.oneClearError(in.ctr(in.runArgs("--rm", "--sandbox", p.id, "--config", config, in.d.ID(test.name))...), test.want...)
			})
		}
		if r := p.exec(p.d.ID("sibling"), "after", "sh", "-c", "cat /mnt/host/file"); r.stdout != "text\n" {
			p.Errorf("container beside them: %v", r)
		}
		p.onlyMountsOf("sibling")
		p.stop()
		sibling.wait()
		p.shutdown()
	})
}

// onlyMountsOf wants mounts of one container, which mounts one volume, and of no
// other, where the shim keeps those of all.
func (p *pod) onlyMountsOf(name string) {
	p.Helper()
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.process("containerd-shim").PID))
	if err != nil {
		p.Fatal(err)
	}
	found, volumes := 0, map[string]bool{}
	for _, line := range lines(string(mounts)) {
		_, below, ok := strings.Cut(strings.Fields(line)[4], "+"+p.id+"/") // the pod's directory
		switch {
		case strings.Contains(below, p.d.ID(name)):
			found++
		case strings.Contains(below, "/.volumes/"):
			volumes[filepath.Base(below)] = true
		case ok && strings.Contains(below, "/"):
			p.Errorf("left: %s", line)
		}
	}
	if found == 0 || len(volumes) != 1 {
		p.Errorf("no mount of %s, or other volumes than its own:\n%s", name, mounts)
	}
}

// TestMountInOddPlaces is of destinations that do not look as if they would work.
func TestMountInOddPlaces(t *testing.T) {
	onNewest(t, func(e *env) {
		dir := e.hostFiles()
		e.writeFile(filepath.Join(dir, "dir/inside"), []byte("inside\n"))
		r := e.runSpec("cat /new/deep/inside /etc/new/file /new/deep/../above/inside /etc/over/inside; touch /x; touch /new/deep/x; ls /new", func(s *specs.Spec) {
			s.Root.Readonly = true
			if err := os.Symlink("/etc", filepath.Join(s.Root.Path, "absolute")); err != nil {
				e.Fatal(err)
			}
			s.Mounts = append(s.Mounts,
				bindMount(dir, "dir", "/new/deep"), bindMount(dir, "file", "/etc/new/file"), bindMount(dir, "dir", "/../../new/above"), bindMount(dir, "dir", "/absolute/over"))
		})
		if want := "inside\ntext\ninside\ninside\nabove\ndeep\n"; r.stdout != want || r.stderr != "touch: /x: Read-only file system\n" {
			e.Errorf("%v, want stdout %q", r, want)
		}
	})
}

// TestFullVolume fills a file system of the host from a container. It is told so, and
// neither the container beside it nor what serves both is harmed.
func TestFullVolume(t *testing.T) {
	onNewestWithSandboxes(t, func(p *pod) {
		small, other := p.TempDir(), p.TempDir()
		if err := unix.Mount("small", small, "tmpfs", 0, "size=4m"); err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() {
			if err := unix.Unmount(small, 0); err != nil {
				p.Errorf("the volume is held: %v", err)
			}
		})
		p.writeFile(filepath.Join(small, "of the host"), nil) // else it is taken for an emptyDir in memory
		p.run("")
		daemon := p.process("virtiofsd")
		sibling := p.startSh("sibling", "echo ready; sleep 1000", append(bind(other, "/mnt/other", "rw"), "--sandbox", p.id)...)
		sibling.expect("ready")
		const script = `cd /mnt/small
			dd if=/dev/zero of=large bs=64k 2>&1 | grep -o 'No space.*'
			echo text > another; echo status $?
			dd if=/dev/zero of=large bs=4k seek=4000 count=1 conv=notrunc 2>&1 | grep -o 'No space.*'
			fallocate -l 1m third; echo status $?
			wc -c < large
			truncate -s 1048576 large && echo text > another && cat another; echo status $?`
		full := append(bind(small, "/mnt/small", "rw"), "--sandbox", p.id)
		r := p.startSh("full", script, full...).wait()
		want := "No space left on device\nstatus 1\nNo space left on device\nstatus 1\n4194304\ntext\nstatus 0\n"
		if r.stdout != want || r.code != 0 {
			p.Errorf("%v, want stdout %q", r, want)
		}
		if r := p.exec(p.d.ID("sibling"), "after", "sh", "-c", "echo text > /mnt/other/file && cat /mnt/other/file"); r.stdout != "text\n" {
			p.Errorf("container beside it: %v", r)
		}
		if again := p.process("virtiofsd"); again.PID != daemon.PID {
			p.Errorf("virtiofsd was %v, is %v", daemon, again)
		}
		if info, err := os.Stat(filepath.Join(small, "large")); err != nil || info.Size() != 1<<20 {
			p.Errorf("on the host: %v, %v", info, err)
		}
		p.stop()
		if r := sibling.wait(); r.code != 137 || strings.TrimSpace(r.stdout) != "ready" {
			p.Errorf("container beside it, in the end: %v", r)
		}
		p.shutdown()
	})
}
