package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/test/daemon"
)

// hostParts are what a pod has on the host.
var hostParts = []string{"containerd-shim", "qemu-system", "virtiofsd"}

// inCgroup wants the host's parts of the only sandbox in a cgroup, in every hierarchy.
func (e *env) inCgroup(path string, more ...string) {
	e.Helper()
	list, err := e.d.Processes()
	if err != nil {
		e.Fatal(err)
	}
	parts := append(slices.Clone(hostParts), more...)
	seen := map[string]bool{}
	for _, p := range list {
		i := slices.IndexFunc(parts, func(name string) bool { return strings.HasPrefix(p.Name, name) })
		if i < 0 {
			continue
		}
		seen[parts[i]] = true
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
		if err != nil {
			e.Error(err)
		}
		for _, line := range lines(string(raw)) {
			if !strings.HasSuffix(line, ":"+path) {
				e.Errorf("%s is in cgroup %s, want %s", p.Name, line, path)
			}
		}
	}
	for _, name := range parts {
		if !seen[name] {
			e.Errorf("no %s among %v", name, list)
		}
	}
}

// cgroupDirs are the directories of a cgroup that are there.
func (e *env) cgroupDirs(path string) []string {
	e.Helper()
	var dirs []string
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		found, err := filepath.Glob(pattern + path)
		if err != nil {
			e.Fatal(err)
		}
		dirs = append(dirs, found...)
	}
	return dirs
}

// charged is the memory that is charged to a cgroup, in bytes.
func (e *env) charged(path string) uint64 {
	e.Helper()
	for _, file := range []string{"/sys/fs/cgroup/memory" + path + "/memory.usage_in_bytes", "/sys/fs/cgroup" + path + "/memory.current"} {
		raw, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		n, perr := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
		if err := errors.Join(err, perr); err != nil {
			e.Fatal(err)
		}
		return n
	}
	e.Fatalf("cgroup %s has no memory controller", path)
	return 0
}

// resident is what a VM's process has touched of the guest's memory, which it shares
// with others, and of its own, in bytes.
func (e *env) resident(p daemon.Process) (ram, own uint64) {
	e.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		e.Fatal(err)
	}
	for _, line := range lines(string(raw)) {
		fmt.Sscanf(line, "RssShmem: %d kB", &ram)
		fmt.Sscanf(line, "RssAnon: %d kB", &own)
	}
	return ram << 10, own << 10
}

func TestHostCgroup(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("run", "sleep 1000")
		path := "/" + e.d.Token + "/" + id
		e.inCgroup(path)
		const fill = 48 << 20
		if r := e.exec(id, "fill", "sh", "-c", fmt.Sprintf("head -c %d /dev/zero > /dev/shm/f", fill)); r.code != 0 {
			e.Fatal(r)
		}
		ram, own := e.resident(e.process("qemu-system"))
		charged := e.charged(path)
		e.Logf("charged: %d MiB, of which the guest's memory %d, the monitor's own %d", charged>>20, ram>>20, own>>20)
		if charged < ram+own || ram < fill {
			e.Errorf("the cgroup is charged %d bytes; the VM has touched %d of the guest's memory, in which the guest wrote %d, and %d of its own", charged, ram, fill, own)
		}
		e.must("task", "kill", "--signal", "SIGKILL", id)
		e.must("task", "rm", "--force", id)
		if left := e.cgroupDirs(path); len(left) > 0 {
			e.Errorf("left when the task was deleted: %q", left)
		}
	})
}

// The process that connects to sockets is put there by another way.
func TestHostCgroupAsSystemdNamesIt(t *testing.T) {
	eachHusk(t, func(e *env) {
		slice := "husk" + strings.ReplaceAll(e.d.Token, "-", "_")
		above := "/" + slice + ".slice/" + slice + "-pod.slice"
		path := above + "/cri-containerd-" + e.d.ID("run") + ".scope"
		e.Cleanup(func() { // nobody else does, where there is no systemd
			for _, dir := range append(e.cgroupDirs(above), e.cgroupDirs("/"+slice+".slice")...) {
				if err := os.Remove(dir); err != nil {
					e.Error(err)
				}
			}
		})
		dir, err := os.MkdirTemp("/tmp", "hk-uds") // a socket's path is short
		if err != nil {
			e.Fatal(err)
		}
		e.Cleanup(func() { os.RemoveAll(dir) })
		config := e.spec(func(s *specs.Spec) {
			s.Process.Args = []string{"sh", "-c", "echo ready; sleep 1000"}
			s.Linux.CgroupsPath = slice + "-pod.slice:cri-containerd:" + e.d.ID("run")
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt/uds", Type: "uds", Source: e.echo(dir)})
		})
		c := e.start(e.runArgs("--rm", "--config", config, e.d.ID("run"))...)
		c.expect("ready")
		e.inCgroup(path, "husk-dialer")
		e.must("task", "kill", "--signal", "SIGKILL", e.d.ID("run"))
		if r := c.wait(); r.code != 137 {
			e.Errorf("%v, want exit code 137", r)
		}
		if left := e.cgroupDirs(path); len(left) > 0 {
			e.Errorf("left when the task was deleted: %q", left)
		}
	})
}

// What is in no cgroup of its own is where containerd is, and is not moved.
func TestHostCgroupOfNoName(t *testing.T) {
	eachHusk(t, func(e *env) {
		raw, err := os.ReadFile("/proc/self/cgroup") // containerd was started here
		if err != nil {
			e.Fatal(err)
		}
		config := e.spec(func(s *specs.Spec) {
			s.Process.Args = []string{"sh", "-c", "echo ready; sleep 1000"}
			s.Linux.CgroupsPath = ""
		})
		c := e.start(e.runArgs("--rm", "--config", config, e.d.ID("run"))...)
		c.expect("ready")
		vm, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", e.process("qemu-system").PID))
		if err != nil || string(vm) != string(raw) {
			e.Errorf("the VM is in %q, %v, want %q", vm, err, raw)
		}
		e.must("task", "kill", "--signal", "SIGKILL", e.d.ID("run"))
		c.wait()
	})
}

func TestHostCgroupThatIsNone(t *testing.T) {
	eachHusk(t, func(e *env) {
		r := e.runSpec("true", func(s *specs.Spec) { s.Linux.CgroupsPath = "/../" + e.d.Token })
		e.oneClearError(r, "linux.cgroupsPath", "/../"+e.d.Token)
	})
}

// Whoever dies, nothing is left: the leftovers' check looks into every hierarchy too.
func TestHostCgroupAfterAKill(t *testing.T) {
	for _, name := range []string{"containerd-shim", "qemu-system", "virtiofsd", "containerd"} {
		t.Run(name, func(t *testing.T) {
			eachHusk(t, func(e *env) {
				id := e.detached("run", "sleep 1000")
				path := "/" + e.d.Token + "/" + id
				if len(e.cgroupDirs(path)) == 0 {
					e.Errorf("there is no cgroup %s", path)
				}
				if name == "containerd" {
					if err := errors.Join(e.d.Kill(e.Context()), e.d.Resume(e.Context())); err != nil {
						e.Fatal(err)
					}
					e.inCgroup(path)
					e.must("task", "kill", "--signal", "SIGKILL", id)
				} else {
					events := e.listen()
					e.kill(e.process(name))
					events.expect("/tasks/exit")
					events.end()
				}
				e.ctr("task", "rm", "--force", id) // gone, where containerd has noticed that the shim is
				if left := e.cgroupDirs(path); len(left) > 0 {
					e.Errorf("left: %q", left)
				}
			})
		})
	}
}

// A kill by the host for want of memory can be told from others: it is counted where
// the VM is, though the limit is that of the cgroup above.
func TestHostCgroupOutOfMemory(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("run", "sleep 1000")
		above, path := "/"+e.d.Token, "/"+e.d.Token+"/"+id
		vm := e.process("qemu-system")
		// What can be given back, which is page cache, does not count. What the guest
		// has touched and freed it writes to first, hence so little more.
		ram, own := e.resident(vm)
		limit := ram + own + 12<<20
		set := false
		for _, file := range []string{"/sys/fs/cgroup/memory" + above + "/memory.limit_in_bytes", "/sys/fs/cgroup" + above + "/memory.max"} {
			if _, err := os.Lstat(file); err == nil {
				e.writeFile(file, strconv.AppendUint(nil, limit, 10))
				set = true
			}
		}
		if !set {
			e.Fatal("no limit of memory can be set")
		}
		e.exec(id, "fill", "sh", "-c", "head -c 60000000 /dev/zero > /dev/shm/f") // it dies with the VM
		ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
		defer cancel()
		if err := daemon.WaitExit(ctx, vm.PID); err != nil {
			ram, own := e.resident(vm)
			e.Fatalf("the VM lives with %d MiB where %d may be charged, %d are: %v", (ram+own)>>20, limit>>20, e.charged(path)>>20, err)
		}
		kills := ""
		for _, dir := range e.cgroupDirs(path) {
			for _, file := range []string{"memory.oom_control", "memory.events"} {
				raw, err := os.ReadFile(filepath.Join(dir, file))
				if err == nil {
					kills += string(raw)
				}
			}
		}
		if !slices.Contains(lines(kills), "oom_kill 1") {
			e.Errorf("the cgroup's counters say %q, want oom_kill 1", kills)
		}
		e.must("task", "rm", "--force", id)
	})
}
