package cri

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// The tests of this file are some of every other's, in few pods, where the host
// has all that Husk makes use of: they fail where a pod silently does without.

func TestSmokeOfOnePod(t *testing.T) {
	wantSmoke(t)
	each(t, setup{husk: true}, func(e *env) {
		p, members := e.smokePod()
		e.kill(e.machine(p))
		e.wantEnd(callTimeout, p, members...)
		p.remove()
		e.settled()
	})
}

func TestSmokeOfPodsAndTheHostsNetwork(t *testing.T) {
	wantSmoke(t)
	each(t, setup{husk: true}, func(e *env) {
		p, members := e.smokePod()

		q := e.run("other")
		other := q.start("c", greeter("8080", "other"))
		members[1].want(fetch(q.ip4()+":8080"), "other")

		world := e.world()
		e.serve(world, "192.0.2.3:9000", "world")
		h := e.run("host", hostNetwork)
		d := h.start("d", greeter("8082", "pod"))
		d.want(fetch("192.0.2.3:9000"), "world")
		e.wantGreeting(world, "192.0.2.2:8082", "pod")
		e.wantFast(e.machine(h), "/dev/vhost-vsock")

		e.kill(e.processOf(h, "passt"))
		e.wantEnd(callTimeout, h, d)
		for _, c := range append(members, other) {
			c.running()
		}
		for _, pod := range []*pod{p, q, h} {
			pod.remove()
		}
		e.settled()
	})
}

// TestSmokeOfResize grows a machine by what is plugged under KVM alone, a vCPU, and by
// memory, and has it shrink again.
func TestSmokeOfResize(t *testing.T) {
	wantSmoke(t)
	each(t, setup{husk: true}, func(e *env) {
		e.configure(daemon.Settings{"hypervisor": {"max_vcpus": 2, "max_memory_mib": 768}, "runtime": {"boot_timeout": "5m"}})
		p := e.run("resize", asks(1000, 256))
		c := p.start("c", idle, limits(1000, 256))
		booted := c.memTotal()
		for _, want := range []struct {
			cpus        string
			milli, mib  int64
			least, most int
		}{{"2", 2000, 512, 512, 768}, {"1", 1000, 256, 256, booted + 64}} {
			began := time.Now()
			c.updated(kubeletResources(want.milli, want.mib))
			e.Logf("update to %s CPUs and %d MiB took %v", want.cpus, want.mib, time.Since(began))
			e.within(time.Minute*patience(), "the machine has the size asked for", func(context.Context) error {
				if cpus, total := c.sh("nproc"), c.memTotal(); cpus != want.cpus || total < want.least || total > want.most {
					return fmt.Errorf("nproc is %s, MemTotal %d MiB; want %+v", cpus, total, want)
				}
				return nil
			})
			if got := c.memoryMax(); got != fmt.Sprint(want.mib*mib) {
				e.Errorf("limit of memory is %s, want %d MiB", got, want.mib)
			}
		}
		p.remove()
		e.settled()
	})
}

// wantSmoke skips a test that nobody asked for, and holds the host to its part:
// what limits a container in its guest is cgroup v2 wherever that runs.
func wantSmoke(t *testing.T) {
	t.Helper()
	if !*smokeFlag {
		t.Skip("needs KVM, vhost-vsock, vhost-net and cgroup v2; -smoke runs it, as the rig does")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		t.Errorf("/sys/fs/cgroup is a file system of type %#x, %v; want cgroup v2", fs.Type, err)
	}
}

// smokePod runs a pod of two containers, and all that it takes one pod to try.
func (e *env) smokePod() (*pod, []*container) {
	e.Helper()
	p := e.run("one")
	a := p.start("a", greeter("127.0.0.1:8080", "forwarded"), func(c *runtime.ContainerConfig) {
		c.Linux.Resources.MemoryLimitInBytes = 64 << 20
	})
	b := p.start("b", greeter(p.ip4()+":8081", "reached"))
	machine := e.machine(p)
	e.wantFast(machine, "/dev/vhost-vsock", "/dev/vhost-net")
	a.want("cat /sys/fs/cgroup/memory.max", "67108864")
	b.want(fetch("127.0.0.1:8080"), "forwarded")
	if r := b.exec("echo probe; exit 42"); r.code != 42 || r.stdout != "probe\n" {
		e.Errorf("exec probe: %v", r)
	}
	if got, err := p.forward(8080, "GET / HTTP/1.0\r\n\r\n"); err != nil || !strings.HasSuffix(got, "forwarded\n") {
		e.Errorf("port-forward: %q, %v", got, err)
	}
	e.wantGreeting(e.d.NetNS(), p.ip4()+":8081", "reached")
	e.wantVhostCarries(p)
	return p, []*container{a, b}
}

// machine is the pod's QEMU.
func (e *env) machine(p *pod) daemon.Process {
	e.Helper()
	return e.processOf(p, "qemu-system")
}

// wantFast wants a machine of the fast accelerator and carrier, and files that it
// holds open, by what their links in /proc say.
func (e *env) wantFast(machine daemon.Process, files ...string) {
	e.Helper()
	args := strings.Join(machine.Args, " ")
	for _, word := range []string{"-accel kvm", "vhost-vsock-pci"} {
		if !strings.Contains(args, word) {
			e.Errorf("QEMU runs without %q: %s", word, args)
		}
	}
	open := map[string]bool{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", machine.PID)) // the pattern is well-formed
	for _, link := range links {
		file, err := os.Readlink(link)
		if err == nil {
			open[file] = true
		}
	}
	for _, file := range append(files, "/dev/kvm", "anon_inode:kvm-vcpu:0") {
		if !open[file] {
			e.Errorf("QEMU has no %s open, but %v", file, open)
		}
	}
}

// vhostWork is how often each of the kernel's threads that work for a machine's
// vhost devices has gone to sleep, which each does when it has done what there
// was to do, by the thread's id.
func (e *env) vhostWork(machine daemon.Process) map[string]int {
	e.Helper()
	// They are the kernel's own up to Linux 6.3, later the machine's.
	var threads []string
	for _, pattern := range []string{"/proc/[0-9]*", fmt.Sprintf("/proc/%d/task/*", machine.PID)} {
		found, _ := filepath.Glob(pattern) // the pattern is well-formed
		threads = append(threads, found...)
	}
	work := map[string]int{}
	for _, dir := range threads {
		status, err := os.ReadFile(dir + "/status")
		if err != nil || !bytes.HasPrefix(status, fmt.Appendf(nil, "Name:\tvhost-%d\n", machine.PID)) {
			continue
		}
		_, text, _ := strings.Cut(string(status), "\nvoluntary_ctxt_switches:")
		text, _, _ = strings.Cut(text, "\n")
		count, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			e.Fatalf("read %s/status: %v", dir, err)
		}
		work[filepath.Base(dir)] = count
	}
	return work
}

// wantVhostCarries wants a ping of the pod from its node to be work for a thread
// of vhost's, beside the one for vsock, which hears nothing of it.
func (e *env) wantVhostCarries(p *pod) {
	e.Helper()
	machine := e.machine(p)
	before := e.vhostWork(machine)
	e.node("busybox ping -A -q -c 20 -W 60 " + p.ip4())
	after := e.vhostWork(machine)
	e.Logf("vhost's threads have slept %v times before 20 pings, and %v after", before, after)
	if len(before) != 2 {
		e.Errorf("%d threads of vhost, want 2", len(before))
	}
	for thread, count := range before {
		if after[thread] >= count+20 {
			return
		}
	}
	e.Error("no thread of vhost had work with 20 pings")
}
