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

// TestManySmallFiles has more files in a guest than virtiofsd can serve at once
// where the limit of open files is low.
func TestManySmallFiles(t *testing.T) {
	onNewest(t, func(e *env) {
		const files = 10_000
		programs, host := e.program("torture"), e.TempDir()
		args := append([]string{"--rm"}, bind(programs, "/test", "ro")...)
		args = append(args, bind(host, "/mnt/host", "rw")...)
		r := e.ctr(e.runArgs(append(args, images.Busybox, e.d.ID("many"), "/test/torture", "many", fmt.Sprint(files), "/mnt/host")...)...)
		if want := fmt.Sprintf("%d files\n", files); r.stdout != want {
			e.Errorf("%v, want %q", r, want)
		}
		dirs, err := os.ReadDir(host)
		if len(dirs) != files/1000 {
			e.Errorf("%d directories on the host: %v", len(dirs), err)
		}
	})
}
