package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// husk runs a command of the operator's tool, with the daemon's configuration.
func (e *env) husk(command string, args ...string) result {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(e.root, "build", "bin", "husk"),
		append([]string{command, "-config", filepath.Join(e.d.Dir, "configuration.toml"), "-n", e.d.Token}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() < 0 {
		e.Fatalf("husk %s %q: %v (limit %v): %s", command, args, err, commandTimeout, &stderr)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// A podStatus is what husk status says of a pod to programs.
type podStatus struct {
	Namespace, ID, State string
	Memory               struct {
		PSS int64 `json:"pss_kib"`
	}
	CPUs, Nodes string
	Placement   struct {
		CPUs        string
		MemoryNodes string `json:"memory_nodes"`
		Pinned      bool
	}
	Containers []struct{ ID, State string }
	VCPUs      []struct {
		CPUs   string
		Thread int
	}
	Age       *int64 `json:"age_seconds"`
	Processes []struct {
		Name       string
		PID        int
		Affinities []struct {
			CPUs    string
			Threads int
		}
		Memory struct {
			PSS int64 `json:"pss_kib"`
		}
	}
	Cgroups           []struct{ Path string }
	Warnings, Unknown []string
}

func (e *env) status(id string) (p podStatus) {
	e.Helper()
	r := e.husk("status", "-json", id)
	if r.code != 0 || r.stderr != "" {
		e.Fatalf("husk status %s: %v", id, r)
	}
	if err := json.Unmarshal([]byte(r.stdout), &p); err != nil {
		e.Fatalf("decode %s: %v", r.stdout, err)
	}
	return p
}

// silent tells whether husk status has missed the shim's answer.
func (p podStatus) silent() bool {
	return slices.ContainsFunc(p.Unknown, func(s string) bool { return strings.Contains(s, "the shim does not answer within") })
}

// running wants each process that a pod is made of, with its threads, CPUs and memory, and
// returns the shim's pid.
func (p podStatus) running(e *env) (shim int) {
	e.Helper()
	names := map[string]int{}
	for _, one := range p.Processes {
		names[one.Name] = one.PID
		if len(one.Affinities) == 0 || one.Affinities[0].CPUs == "" || one.Affinities[0].Threads == 0 || one.Memory.PSS == 0 {
			e.Errorf("of %s (pid %d) are missing threads, CPUs or memory: %+v", one.Name, one.PID, one)
		}
	}
	for _, name := range []string{"shim", "qemu", "virtiofsd"} {
		if names[name] == 0 {
			e.Errorf("%s is missing: %+v", name, p)
		}
	}
	if p.CPUs == "" || p.Memory.PSS < 50<<10 || p.Age == nil || len(p.Cgroups) == 0 {
		e.Errorf("CPUs, 50 MiB of memory, an age or a cgroup are missing: %+v", p)
	}
	return names["shim"]
}

// What runs of a pod on the host is seen, whether its shim answers or not.
func TestHuskStatus(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("status", "sleep 1000")
		before := e.status(id)
		shim := before.running(e)
		if before.silent() || before.ID != id || before.Namespace != e.d.Token || before.State != "running" ||
			len(before.Containers) != 1 || before.Containers[0].ID != id || before.Containers[0].State != "running" {
			e.Errorf("of a shim that answers: %+v", before)
		}
		if r := e.husk("status"); r.code != 0 || !strings.Contains(r.stdout, e.d.Token+"  "+id+"  ") {
			e.Errorf("the table: %v", r)
		}
		if r := e.husk("status", id[:len(id)-1]); r.code != 0 || !strings.Contains(r.stdout, e.d.Token+"/"+id+"\n") || !strings.Contains(r.stdout, "\nqemu ") {
			e.Errorf("by the beginning of its id: %v", r)
		}

		e.made(unix.Kill(shim, unix.SIGSTOP))
		e.Cleanup(func() { unix.Kill(shim, unix.SIGCONT) }) //nolint:errcheck // it goes on already, or has ended
		e.stopped(shim)
		stopped := e.status(id)
		if got := stopped.running(e); got != shim || !stopped.silent() || stopped.State != "unknown" {
			e.Errorf("of a shim that is stopped: %+v", stopped)
		}
		if r := e.husk("pause", id); r.code != 1 || !strings.Contains(r.stderr, "the shim does not answer within") {
			e.Errorf("pause by a shim that is stopped: %v", r)
		}
		e.made(unix.Kill(shim, unix.SIGCONT))

		if after := e.status(id); after.running(e) != shim || after.silent() {
			e.Errorf("of a shim that goes on: %+v", after)
		}
		if r := e.husk("status", "no-such-pod"); r.code != 1 || !strings.Contains(r.stderr, `no pod "no-such-pod" in namespace`) {
			e.Errorf("of no pod: %v", r)
		}
	})
}

// stopped waits until every thread of a process is, of which the kernel tells its parent
// alone.
func (e *env) stopped(pid int) {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), commandTimeout)
	defer cancel()
	tasks := filepath.Join("/proc", strconv.Itoa(pid), "task")
	for {
		entries, err := os.ReadDir(tasks)
		e.made(err)
		if !slices.ContainsFunc(entries, func(task os.DirEntry) bool {
			raw, err := os.ReadFile(filepath.Join(tasks, task.Name(), "status"))
			return err != nil || !strings.Contains(string(raw), "\nState:\tT")
		}) {
			return
		}
		e.made(ctx.Err())
	}
}
