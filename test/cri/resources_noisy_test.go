package cri

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// noise is how long a container does its worst beside another.
	noise = 6 * time.Second
	// noisyLatency bounds what a neighbour's own work takes, noisyExec an exec in the
	// neighbour from outside: on a busy machine without KVM, where the guest has one CPU
	// which the noise would have too.
	noisyLatency = 3 * time.Second
	noisyExec    = 20 * time.Second
	// noisyGrowth is how much the shim's memory may have grown when the noise is over.
	noisyGrowth = 24 << 20
)

// worst is the worst latency, and how many windows of a second were told of, in what a
// probe has printed since a length of its log.
func (c *container) worst(since int) (worst time.Duration, windows int) {
	c.e.Helper()
	out := c.output("stdout")
	for line := range strings.Lines(out[min(since, len(out)):]) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "worst" {
			continue
		}
		us, err := strconv.Atoi(fields[1])
		if err != nil {
			c.e.Fatalf("line of a probe %q", line)
		}
		worst, windows = max(worst, time.Duration(us)*time.Microsecond), windows+1
	}
	return worst, windows
}

// TestNoisyNeighbours has one container after another of a pod take all of one thing,
// beside one that is to notice little of it.
func TestNoisyNeighbours(t *testing.T) {
	while := noise
	if *longFlag {
		while = 30 * time.Second
	}
	each(t, setup{}, func(e *env) {
		if (e.generation != "2.4" || e.handler == "husk-shim") && !*longFlag {
			e.Skip("the guest's part is the same with containerd 2.4 by the task API; -long runs it")
		}
		k := e.kubelet("noisy")
		small := k.memory("small", 32*mib)
		p := e.run("noisy", asks(1000, 448))
		sibling := p.start("sibling", "exec /hog probe /tmp", e.hog(), limits(0, 64))
		sibling.waitOutput("worst")
		before, _ := sibling.worst(0)
		e.Logf("alone the neighbour's worst latency is %v", before)
		measure := func() int {
			e.Helper()
			return e.residentBytes(e.processOf(p, "containerd-shim"))
		}
		shim := measure()

		for _, tt := range []struct {
			name, script string
			// guest is for what would harm the host where that is the container's.
			guest bool
		}{
			{name: "cpu", script: "/hog cpu user & /hog cpu system & wait"},
			// No limit but those of the whole guest.
			{name: "fork", script: "exec /hog fork", guest: true},
			{name: "memory", script: "while :; do /hog memory 0; done"},
			{name: "disk", script: "/hog disk /small"},
			{name: "fds", script: "for i in 1 2 3 4; do /hog fds / & done; wait", guest: true},
			{name: "log", script: "exec /hog log"},
		} {
			if tt.guest && !e.isHusk() {
				continue
			}
			since := len(sibling.output("stdout"))
			hog := p.start(tt.name, tt.script, e.hog(), with(rw(small, "/small")), limits(0, 96))
			deadline := time.Now().Add(while)
			var slowest time.Duration
			for execs := 0; execs < 3 || time.Now().Before(deadline); execs++ {
				began := time.Now()
				if r, err := sibling.tryExec(int64((noisyExec * patience()).Seconds()), "true"); err != nil || r.code != 0 {
					e.Errorf("%s: exec in the neighbour: %v, %v", tt.name, r, err)
					break
				}
				slowest = max(slowest, time.Since(began))
			}
			if now := measure(); now > shim+noisyGrowth {
				e.Errorf("%s: the shim's memory has grown from %d to %d MiB", tt.name, shim/mib, now/mib)
			}
			began := time.Now()
			u, err := hog.tryUsage()
			if err != nil {
				e.Errorf("%s: statistics of what makes the noise: %v", tt.name, err)
			}
			e.Logf("%s has %d processes and threads and %d MiB, as it told in %v", tt.name, u.pids, u.memory/mib, time.Since(began))
			began = time.Now()
			hog.stop()
			hog.remove()
			e.Logf("%s was ended in %v", tt.name, time.Since(began))
			os.Remove(hog.log) // a flood's is large
			worst, windows := sibling.worst(since)
			e.Logf("beside %s: worst latency %v in %d windows, slowest exec %v, shim %d MiB", tt.name, worst, windows, slowest, measure()/mib)
			if windows < int(while.Seconds())/4 || worst > noisyLatency*patience() {
				e.Errorf("beside %s the neighbour's worst latency is %v, and it told of %d seconds", tt.name, worst, windows)
			}
			if slowest > noisyExec*patience() {
				e.Errorf("beside %s an exec took %v", tt.name, slowest)
			}
			sibling.running()
		}
		sibling.want("echo here", "here")
		if s := p.status(); s.State != runtime.PodSandboxState_SANDBOX_READY {
			e.Errorf("pod is %v", s.State)
		}
		if after := measure(); after > shim+noisyGrowth {
			e.Errorf("the shim's memory has grown from %d to %d MiB", shim/mib, after/mib)
		}
		began := time.Now()
		p.remove()
		e.settled()
		e.Logf("the pod was removed in %v", time.Since(began))
	})
}
