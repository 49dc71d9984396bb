package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A container whose command is /proc/self/exe runs the guest's crun, and so can
// name the binary that is root's in the guest (CVE-2019-5736). It may read it,
// and do nothing else with it: not even by a descriptor that it kept.
func TestCrunIsReadOnlyToAContainer(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.d.ID("self")
		path := e.spec(func(s *specs.Spec) {
			// crun waits for a writer of the FIFO, and so is there to be looked at.
			if err := unix.Mkfifo(filepath.Join(s.Root.Path, "fifo"), 0o600); err != nil {
				e.Fatal(err)
			}
			s.Process.Args = []string{"/proc/self/exe", "run", "--config", "/fifo", "inner"}
		})
		e.must(e.runArgs("-d", "--null-io", "--config", path, id)...)
		if r := e.exec(id, "is", "readlink", "/proc/1/exe"); r.stdout != "/bin/crun\n" {
			e.Fatalf("the container runs no crun: %v", r)
		}
		before := e.exec(id, "before", "sha256sum", "/proc/1/exe")
		if before.code != 0 {
			e.Errorf("read crun: %v", before)
		}
		for name, script := range map[string]string{
			"append":   "echo x >> /proc/1/exe",
			"truncate": "echo x > /proc/1/exe",
			"kept":     "exec 3</proc/1/exe; echo x > /proc/self/fd/3",
			"mode":     "chmod 777 /proc/1/exe",
		} {
			if r := e.exec(id, name, "sh", "-c", script); r.code == 0 || !strings.Contains(r.stderr, "Read-only file system") {
				e.Errorf("%s: %v, want a read-only file system", script, r)
			}
		}
		if after := e.exec(id, "after", "sha256sum", "/proc/1/exe"); after != before {
			e.Errorf("crun was %v, is %v", before, after)
		}
	})
}
