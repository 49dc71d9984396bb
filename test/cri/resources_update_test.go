package cri

import (
	"context"
	"fmt"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// TestUpdateOfAContainersLimits holds at once, or changes nothing.
func TestUpdateOfAContainersLimits(t *testing.T) {
	each(t, setup{tasks: true}, func(e *env) {
		p := e.run("update", asks(1000, 384))
		a := p.start("a", "/hog memory 40", e.hog(), limits(500, 64))
		b := p.start("b", idle, limits(500, 96))
		a.ready()
		want := func(c *container, memoryMiB int64, cpu string) {
			e.Helper()
			if got, want := c.memoryMax(), fmt.Sprint(memoryMiB*mib); got != want {
				e.Errorf("limit of memory is %s, want %s", got, want)
			}
			if got := c.cpuMax(); got != cpu {
				e.Errorf("quota is %s, want %s", got, cpu)
			}
		}
		want(a, 64, "50000 100000")
		a.updated(kubeletResources(250, 128))
		want(a, 128, "25000 100000")
		a.updated(kubeletResources(750, 96))
		want(a, 96, "75000 100000")

		// Less than is in use: not possible, and nothing of the request is done.
		err := a.update(kubeletResources(250, 16))
		if e.isHusk() {
			e.wantError("limit below what is in use", err, "memory", "uses")
			want(a, 96, "75000 100000")
		} else if err == nil {
			e.Error("a limit below what is in use was taken")
		}
		a.running()
		if s := a.status().Resources.GetLinux(); s != nil && s.MemoryLimitInBytes != 96*mib {
			e.Errorf("containerd says that the limit is %d", s.MemoryLimitInBytes)
		}

		// What is not in a request stays, and so does the sibling.
		a.updated(&runtime.LinuxContainerResources{CpuShares: 512})
		if got := a.memoryMax(); got != fmt.Sprint(96*mib) {
			e.Errorf("limit of memory is %s after an update of something else", got)
		}
		want(b, 96, "50000 100000")
		a.running()
		p.remove()
		e.settled()
	})
}

// TestResizeOfAPod has its machine grow above what it was booted with, and shrink
// again.
func TestResizeOfAPod(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		if e.generation != "2.4" && !*longFlag {
			e.Skip("the machine's part is the same as with 2.4; -long runs it")
		}
		e.configure(daemon.Settings{"hypervisor": {"max_vcpus": 2, "max_memory_mib": 768}})
		p := e.run("resize", asks(1000, 256))
		a := p.start("a", idle, e.hog(), limits(1000, 256))
		a.want("nproc", "1")
		booted := a.memTotal()

		a.updated(kubeletResources(2000, 640))
		e.within(time.Minute, "the machine has grown", func(context.Context) error {
			if cpus, total := a.sh("nproc"), a.memTotal(); cpus != "2" || total < 640 {
				return fmt.Errorf("nproc is %s, MemTotal %d MiB", cpus, total)
			}
			return nil
		})
		if got := a.cpuMax(); got != "200000 100000" {
			e.Errorf("quota is %s", got)
		}
		// It can be used: more than was there before.
		if r := a.exec("/hog memory 400 >/tmp/hog & until grep -q ready /tmp/hog; do kill -0 $! || exit 1; sleep 0.2; done; kill -9 $!; exit 7"); r.code != 7 {
			e.Errorf("use of what was plugged: %v", r)
		}

		err := a.update(kubeletResources(8000, 640))
		e.wantError("more CPUs than the maximum", err, "8", "2", "max_vcpus")
		err = a.update(kubeletResources(2000, 4096))
		e.wantError("more memory than the maximum", err, "4096", "768", "max_memory_mib")
		a.want("nproc", "2")
		if got := a.memoryMax(); got != fmt.Sprint(640*mib) {
			e.Errorf("limit of memory is %s after updates that were refused", got)
		}

		a.updated(kubeletResources(1000, 256))
		e.within(time.Minute, "the machine has shrunk", func(context.Context) error {
			if cpus, total := a.sh("nproc"), a.memTotal(); cpus != "1" || total > booted+64 {
				return fmt.Errorf("nproc is %s, MemTotal %d MiB, was booted with %d", cpus, total, booted)
			}
			return nil
		})
		a.want("echo here", "here")
		p.remove()
		e.settled()
	})
}
