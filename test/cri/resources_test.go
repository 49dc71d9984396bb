package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// Helpers of the tests of resources, whose files are named resources_*. What a pod and
// its containers are limited to is written as a kubelet does.

const (
	mib = 1 << 20
	// cpuPeriod is a kubelet's, in microseconds.
	cpuPeriod = 100000
)

// kubeletResources is what a kubelet makes of limits, in thousandths of a CPU and in
// MiB; 0 is none.
func kubeletResources(milliCPU, memoryMiB int64) *runtime.LinuxContainerResources {
	return &runtime.LinuxContainerResources{
		CpuPeriod:          cpuPeriod,
		CpuQuota:           milliCPU * cpuPeriod / 1000,
		CpuShares:          max(2, milliCPU*1024/1000),
		MemoryLimitInBytes: memoryMiB * mib,
	}
}

// asks has a pod's resources be these: the sum of its containers' limits.
func asks(milliCPU, memoryMiB int64) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) { c.Linux.Resources = kubeletResources(milliCPU, memoryMiB) }
}

// limits has a container's resources be these, changed by edits.
func limits(milliCPU, memoryMiB int64, edits ...func(*runtime.LinuxContainerResources)) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) {
		c.Linux.Resources = kubeletResources(milliCPU, memoryMiB)
		for _, edit := range edits {
			edit(c.Linux.Resources)
		}
	}
}

// annotated gives a pod an annotation.
func annotated(key, value string) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) {
		if c.Annotations == nil {
			c.Annotations = map[string]string{}
		}
		c.Annotations[key] = value
	}
}

// builtHog is the program of test/hog.
var builtHog = sync.OnceValues(func() ([]byte, error) { return built("github.com/husk-containers/husk/test/hog") })

// hog gives a container the program /hog.
func (e *env) hog() func(*runtime.ContainerConfig) {
	e.Helper()
	path := filepath.Join(e.d.Dir, "hog")
	if _, err := os.Stat(path); err != nil {
		program, err := builtHog()
		if err == nil {
			err = os.WriteFile(path, program, 0o755)
		}
		if err != nil {
			e.Fatal(err)
		}
	}
	return with(ro(path, "/hog"))
}

// podCgroup makes a pod's cgroup as a kubelet does, with a limit of memory where there
// is one, and has the pod be in it. It is removed at the end, when the pods are: one
// that is still in use then fails the test.
func (e *env) podCgroup(name string, memoryMiB int64) func(*runtime.PodSandboxConfig) {
	e.Helper()
	path := filepath.Join(e.d.Token, "pod"+name)
	for _, hierarchy := range e.hierarchies() {
		dir := filepath.Join(hierarchy, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			e.Fatal(err)
		}
		for _, file := range []string{"memory.limit_in_bytes", "memory.max"} {
			file = filepath.Join(dir, file)
			if _, err := os.Stat(file); memoryMiB == 0 || err != nil {
				continue
			}
			if err := os.WriteFile(file, fmt.Append(nil, memoryMiB*mib), 0o644); err != nil {
				e.Fatal(err)
			}
		}
	}
	e.Cleanup(func() {
		if err := e.removeAll(); err != nil {
			e.Errorf("remove pods: %v", err)
		}
		e.settled()
		for _, hierarchy := range e.hierarchies() {
			if err := os.Remove(filepath.Join(hierarchy, path)); err != nil && !errors.Is(err, os.ErrNotExist) {
				e.Errorf("remove the cgroup of a pod that is gone: %v", err)
			}
		}
	})
	return func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = "/" + path }
}

// hierarchies are where cgroups are: those of version 1 that limit what they hold, or the one
// of version 2.
func (e *env) hierarchies() []string {
	e.Helper()
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return []string{root}
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		e.Fatal(err)
	}
	var list []string
	for _, entry := range entries {
		// A new cpuset holds nothing until somebody says what; containerd does.
		if entry.IsDir() && entry.Name() != "cpuset" {
			list = append(list, filepath.Join(root, entry.Name()))
		}
	}
	return append(list, filepath.Join(root, "cpuset"))
}

// cgroupValue reads of a container's own cgroup what a file says that has one name
// in version 1, which runc has here, and another in version 2, which guests have.
func (c *container) cgroupValue(v1, v2 string) string {
	c.e.Helper()
	return c.sh(fmt.Sprintf("cd /sys/fs/cgroup; if test -e cgroup.controllers; then cat %s; else cat %s; fi", v2, v1))
}

// memoryMax is the container's limit of memory in bytes.
func (c *container) memoryMax() string {
	c.e.Helper()
	return c.cgroupValue("memory/memory.limit_in_bytes", "memory.max")
}

// cpuMax is the container's quota, and its period, in microseconds.
func (c *container) cpuMax() string {
	c.e.Helper()
	got := c.cgroupValue("cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us", "cpu.max")
	return strings.Replace(strings.Join(strings.Fields(got), " "), "-1 ", "max ", 1)
}

// memTotal is how much memory the container sees, in MiB.
func (c *container) memTotal() int {
	c.e.Helper()
	return c.number("awk '/^MemTotal/ {print int($2/1024)}' /proc/meminfo")
}

// number is what a script prints.
func (c *container) number(script string) int {
	c.e.Helper()
	n, err := strconv.Atoi(c.sh(script))
	if err != nil {
		c.e.Fatalf("%s: %v", script, err)
	}
	return n
}

// ready waits until the program hog in the container is at work.
func (c *container) ready() {
	c.e.Helper()
	c.waitOutput("ready")
}

// ctr runs a ctr command, which has to succeed unless an error is returned.
func (e *env) ctr(args ...string) (string, error) {
	e.Helper()
	ctx, cancel := e.call()
	defer cancel()
	cmd := e.d.Ctr(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		// ctr 2 says first what it thinks of a host like this one.
		said := slices.DeleteFunc(strings.Split(strings.TrimSpace(stderr.String()), "\n"), func(line string) bool { return strings.Contains(line, "DEPRECATION") })
		err = fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, strings.Join(said, "\n"))
	}
	return string(out), err
}

// state is what containerd has a task's be.
func (c *container) state() string {
	c.e.Helper()
	out, err := c.e.ctr("task", "ls")
	if err != nil {
		c.e.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == c.id {
			return fields[2]
		}
	}
	return "none"
}

// A usage is what containerd's Metrics tells of a task, by either version of cgroups.
type usage struct {
	user, system time.Duration
	// bytes
	memory, anon, file, inactiveFile uint64
	pids                             uint64
	pidsLimit                        uint64
}

// usage asks as `ctr task metrics` does.
func (c *container) usage() usage {
	c.e.Helper()
	u, err := c.tryUsage()
	if err != nil {
		c.e.Fatal(err)
	}
	return u
}

func (c *container) tryUsage() (usage, error) {
	c.e.Helper()
	out, err := c.e.ctr("task", "metrics", "--format", "json", c.id)
	if err != nil {
		return usage{}, err
	}
	var m struct {
		CPU struct {
			User   uint64 `json:"user_usec"`
			System uint64 `json:"system_usec"`
			Usage  struct{ User, Kernel uint64 }
		}
		Memory struct {
			Usage              json.RawMessage
			Anon, File         uint64
			InactiveFile       uint64 `json:"inactive_file"`
			TotalRSS           uint64 `json:"total_rss"`
			TotalCache         uint64 `json:"total_cache"`
			TotalInactiveFiles uint64 `json:"total_inactive_file"`
		}
		Pids struct{ Current, Limit uint64 }
	}
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		return usage{}, fmt.Errorf("decode metrics: %w: %s", err, out)
	}
	u := usage{
		user: time.Duration(m.CPU.User) * time.Microsecond, system: time.Duration(m.CPU.System) * time.Microsecond,
		anon: m.Memory.Anon, file: m.Memory.File, inactiveFile: m.Memory.InactiveFile,
		pids: m.Pids.Current, pidsLimit: m.Pids.Limit,
	}
	if err := json.Unmarshal(m.Memory.Usage, &u.memory); err == nil {
		return u, nil
	}
	var v1 struct{ Usage uint64 }
	if err := json.Unmarshal(m.Memory.Usage, &v1); err != nil {
		return usage{}, fmt.Errorf("decode metrics: %w: %s", err, out)
	}
	u.user, u.system = time.Duration(m.CPU.Usage.User), time.Duration(m.CPU.Usage.Kernel)
	u.memory, u.anon, u.file, u.inactiveFile = v1.Usage, m.Memory.TotalRSS, m.Memory.TotalCache, m.Memory.TotalInactiveFiles
	return u, nil
}

// criStats is what CRI tells of a container.
func (c *container) criStats() *runtime.ContainerStats {
	c.e.Helper()
	ctx, cancel := c.e.call()
	defer cancel()
	r, err := c.e.cri.ContainerStats(ctx, &runtime.ContainerStatsRequest{ContainerId: c.id})
	if err != nil {
		c.e.Fatalf("stats of container: %v", err)
	}
	return r.Stats
}

// criStats is what CRI tells of a pod.
func (p *pod) criStats() *runtime.PodSandboxStats {
	p.e.Helper()
	ctx, cancel := p.e.call()
	defer cancel()
	r, err := p.e.cri.PodSandboxStats(ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		p.e.Fatalf("stats of pod: %v", err)
	}
	return r.Stats
}

// update changes a container's resources as a kubelet does.
func (c *container) update(r *runtime.LinuxContainerResources) error {
	ctx, cancel := c.e.call()
	defer cancel()
	_, err := c.e.cri.UpdateContainerResources(ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: r})
	return err
}

// updated wants an update to succeed.
func (c *container) updated(r *runtime.LinuxContainerResources) {
	c.e.Helper()
	if err := c.update(r); err != nil {
		c.e.Fatalf("update to %v: %v", r, err)
	}
}

// wantError wants one line that holds the words.
func (e *env) wantError(what string, err error, words ...string) {
	e.Helper()
	if err == nil {
		e.Errorf("%s: no error, want one with %q", what, words)
		return
	}
	e.Logf("%s: %v", what, err)
	text := strings.TrimSpace(err.Error())
	if strings.Contains(text, "\n") {
		e.Errorf("%s: the error is not one line: %q", what, text)
	}
	for _, w := range words {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(w)) {
			e.Errorf("%s: no %q in the error: %s", what, w, text)
		}
	}
}

// Events are what containerd tells of tasks, in their order.
type events struct {
	e    *env
	mu   sync.Mutex
	text bytes.Buffer
}

func (ev *events) Write(p []byte) (int, error) {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	return ev.text.Write(p)
}

// events begins to listen, until the test's end.
func (e *env) events() *events {
	e.Helper()
	ev := &events{e: e}
	ctx, cancel := context.WithCancel(context.WithoutCancel(e.Context()))
	cmd := e.d.Ctr(ctx, "events")
	cmd.Stdout = ev
	if err := cmd.Start(); err != nil {
		cancel()
		e.Fatal(err)
	}
	e.Cleanup(func() {
		cancel()
		cmd.Wait()
	})
	// It listens when it hears: nothing tells of it before.
	n := 0
	e.eventually("ctr hears events", func(context.Context) error {
		n++
		if _, err := e.ctr("namespace", "label", "k8s.io", fmt.Sprint("heard=", n)); err != nil {
			return err
		}
		if !strings.Contains(ev.all(), "/namespaces/update") {
			return errors.New("it does not")
		}
		return nil
	})
	return ev
}

func (ev *events) all() string {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	return ev.text.String()
}

// of lists the topics of events of a container's task, without those of execs.
func (ev *events) of(c *container) []string {
	var topics []string
	for line := range strings.Lines(ev.all()) {
		// date time zone zone namespace topic JSON
		before, _, found := strings.Cut(line, "{")
		if fields := strings.Fields(before); found && strings.Contains(line, c.id) && !strings.Contains(line, `"exec_id"`) {
			if topic, ok := strings.CutPrefix(fields[len(fields)-1], "/tasks/"); ok && !isExecsEnd(line) {
				topics = append(topics, topic)
			}
		}
	}
	return topics
}

// isExecsEnd is whether an exit is one of an exec: its id is not the container's.
func isExecsEnd(line string) bool {
	var event struct {
		ContainerID string `json:"container_id"`
		ID          string `json:"id"`
	}
	at := strings.IndexByte(line, '{')
	return json.Unmarshal([]byte(line[at:]), &event) == nil && event.ID != "" && event.ID != event.ContainerID
}

// want waits until the events of a container's task hold these in this order, with or
// without others among them.
func (ev *events) want(c *container, topics ...string) {
	ev.e.Helper()
	ev.e.within(30*time.Second, fmt.Sprint("events ", topics), func(context.Context) error {
		got := ev.of(c)
		rest := topics
		for _, topic := range got {
			if len(rest) > 0 && rest[0] == topic {
				rest = rest[1:]
			}
		}
		if len(rest) > 0 {
			return fmt.Errorf("events are %v", got)
		}
		return nil
	})
}

// cpuTime is what a process has used of the host's CPUs.
func (e *env) cpuTime(p daemon.Process) time.Duration {
	e.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		e.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] { // utime and stime
		n, err := strconv.Atoi(field)
		if err != nil {
			e.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ, on every architecture that containers run on
}
