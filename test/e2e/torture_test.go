package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/husk-containers/husk/test/images"
)

// onNewestWithSandboxes is eachWithSandboxes with the newest containerd alone.
func onNewestWithSandboxes(t *testing.T, test func(p *pod)) {
	t.Helper()
	if !strings.Contains(*runtimeFlag, "husk") {
		t.Skipf("%s has no virtual machine", *runtimeFlag)
	}
	onNewest(t, func(e *env) { test(e.pod()) })
}

// memberArgs completes `ctr run` for a container of the pod that has a program and
// a directory of the host.
func (p *pod) memberArgs(name, programs, host string, command ...string) []string {
	args := []string{"--rm", "--sandbox", p.id}
	args = append(args, bind(programs, "/test", "ro")...)
	args = append(args, bind(host, "/mnt/host", "rw")...)
	args = append(args, images.Busybox, p.d.ID(name))
	return p.runArgs(append(args, command...)...)
}

// TestTortureOfTenWriters has five processes in each of two containers race for one
// directory of the host. Each checks what it sees meanwhile; what they leave is
// checked on the host.
func TestTortureOfTenWriters(t *testing.T) {
	onNewestWithSandboxes(t, func(p *pod) {
		programs, host := p.program("torture"), p.TempDir()
		// Not made by the writers: see docs/limits.md of a file that two make at once.
		p.writeFile(filepath.Join(host, "log"), nil)
		p.run("")
		daemon := p.process("virtiofsd")
		var racing []*command
		for _, group := range []string{"one", "two"} {
			racing = append(racing, p.start(p.memberArgs(group, programs, host,
				"/test/torture", "race", "-group", group, "-writers", "5", "-operations", "400", "/mnt/host")...))
		}
		for _, c := range racing {
			if r := c.wait(); r.code != 0 || r.stderr != "" || r.stdout != "" {
				p.Errorf("torture: %v", r)
			}
		}
		if out := p.onHost(filepath.Join(programs, "torture"), "verify", host); !strings.HasPrefix(out, "10 writers left ") {
			p.Errorf("on the host: %s", out)
		}
		if again := p.process("virtiofsd"); again.PID != daemon.PID {
			p.Errorf("virtiofsd was %v, is %v", daemon, again)
		}
		p.stop()
		p.shutdown()
	})
}

// TestManySmallFiles makes, looks at and removes thousands of files, with -long a
// hundred thousand. virtiofsd holds a descriptor for each that the guest knows, so at
// no time are there more than the host's limit, which may be low, allows: that those of
// files that are gone are closed is part of what is tested.
func TestManySmallFiles(t *testing.T) {
	onNewest(t, func(e *env) {
		files, rounds := 2000, 1
		if *longFlag {
			files, rounds = 10_000, 10
		}
		programs, host := e.program("torture"), e.TempDir()
		id := e.detached("many", "sleep 10000", append(bind(programs, "/test", "ro"), bind(host, "/mnt/host", "rw")...)...)
		for i := range rounds {
			r := e.exec(id, fmt.Sprint("round", i), "/test/torture", "many", fmt.Sprint(files), "/mnt/host/files")
			if want := fmt.Sprintf("%d files\n", files); r.stdout != want || r.code != 0 {
				e.Fatalf("round %d: %v, want %q", i, r, want)
			}
		}
		if left, err := os.ReadDir(host); err != nil || len(left) > 0 {
			e.Errorf("left on the host: %v, %v", left, err)
		}
	})
}
