package guest

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// noises are containers without limits of their own.
var noises = []struct{ name, script string }{
	{"fork bomb", `f() { while :; do f & done; }; f`},
	// A shell that cannot fork ends, and this one begins anew.
	{"lasting fork bomb", `
cat > /tmp/bomb <<'end'
trap 'exec sh /tmp/bomb' EXIT
while :; do (f() { while :; do f & done; }; f) 2>/dev/null; done
end
exec sh /tmp/bomb`},
	{"memory hog", `while :; do dd if=/dev/zero of=/dev/null bs=190M count=1; done`},
	{"disk filler", `while :; do dd if=/dev/zero of=/tmp/f bs=1M count=1000; done`},
	{"shared memory filler", `while :; do dd if=/dev/zero of=/dev/shm/f bs=1M count=1000; done`},
	{"fd hog", `i=0; while :; do sh -c 'i=3; while [ $i -lt 5000 ]; do eval "exec $i</dev/null" || break; i=$((i+1)); done; sleep 1000' & i=$((i+1)); [ $i -lt 50 ] || wait; done`},
	{"log flood", `yes`},
}

const (
	// bound is what a sibling's exec and statistics may take: a bound, ten times the worst
	// that was seen, and no figure of how long they do, which is logged.
	bound = 15 * time.Second
	// rounds is how often they are tried, some seconds in all: a bomb is full by then.
	rounds = 15
)

// TestNoisyContainers holds that an exec in a container and its statistics are answered
// whatever a sibling does, and that the sibling can be removed.
func TestNoisyContainers(t *testing.T) {
	g := boot(t, nil)
	g.run("quiet", "sleep 1000", nil)
	measure := func(name string) (processes uint64) {
		t.Helper()
		var execs, stats []time.Duration
		for i := range rounds {
			begin := time.Now()
			if out, err := g.exec("quiet", fmt.Sprint("e", i), "echo lives"); out != "lives" || err != nil {
				t.Errorf("%s: exec in the sibling: %q, %v", name, out, err)
			}
			execs = append(execs, time.Since(begin))
			begin = time.Now()
			all := g.stats("")
			g.stats("quiet")
			stats = append(stats, time.Since(begin)/2)
			processes = max(processes, all.GetPids().GetCurrent())
		}
		slices.Sort(execs)
		slices.Sort(stats)
		worst := rounds - 1
		t.Logf("%s: exec median %s, worst %s; statistics median %s, worst %s", name, execs[rounds/2], execs[worst], stats[rounds/2], stats[worst])
		if worst := max(execs[worst], stats[worst]); worst > bound {
			t.Errorf("%s: the sibling waits %s", name, worst)
		}
		return processes
	}
	measure("none")
	for _, noise := range noises {
		g.run("noisy", noise.script, nil)
		processes := measure(noise.name)
		s := g.stats("noisy")
		t.Logf("%s: %d processes of all at most, %d now, %d MiB at most, %d killed", noise.name, processes, s.GetPids().GetCurrent(), s.GetMemory().GetMaxUsage()>>20, s.GetMemoryEvents().GetOomKill())
		if noise.name == "lasting fork bomb" && (processes < 100 || s.GetPids().GetCurrent() == 0) {
			t.Errorf("it was no bomb, or has ended")
		}
		begin := time.Now()
		if err := g.remove("noisy"); err != nil {
			t.Fatalf("%s: %v", noise.name, err)
		}
		t.Logf("%s: removed in %s", noise.name, time.Since(begin))
	}
}

// TestOutOfMemory holds that the right container is told of, whichever limit was met.
func TestOutOfMemory(t *testing.T) {
	g := boot(t, nil)
	events, err := g.WatchEvents(g.ctx, &agentv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	g.run("quiet", "sleep 1000", nil)
	ooms := uint64(0)
	for id, r := range map[string]string{"limited": `{"memory":{"limit":33554432}}`, "unlimited": `{}`} {
		g.run(id, "exec dd if=/dev/zero of=/dev/null bs=190M count=1", resources(t, r))
		exit := g.wait(id)
		// It was the limit of a cgroup, the container's or that of all, and not the guest's end.
		ooms++
		if n := g.stats("").GetMemoryEvents().GetOom(); n < ooms {
			t.Errorf("%s: the limits were met %d times, want %d", id, n, ooms)
		}
		if exit.GetExitStatus() != 137 || exit.GetOomEvents() == 0 {
			t.Errorf("%s: %v", id, exit)
		}
		if t.Failed() {
			return
		}
		e, err := events.Recv()
		if err != nil || e.GetOom().GetContainerId() != id {
			t.Errorf("%s: event %v, %v", id, e, err)
		}
		if s := g.stats(id); s.GetMemoryEvents().GetOomKill() == 0 {
			t.Errorf("%s: %v", id, s.GetMemoryEvents())
		}
		if err := g.remove(id); err != nil {
			t.Error(err)
		}
	}
	if out, err := g.exec("quiet", "e", "echo lives"); out != "lives" || err != nil {
		t.Errorf("the sibling: %q, %v", out, err)
	}
	if s := g.stats("quiet"); s.GetMemoryEvents().GetOomKill() != 0 {
		t.Errorf("the sibling: %v", s.GetMemoryEvents())
	}
}

// TestGuestOutOfMemory holds that the host learns of a guest whose kernel has no memory
// left, since a container that may do so has it keep all of it free.
func TestGuestOutOfMemory(t *testing.T) {
	g := boot(t, func(c *hypervisor.Config) { c.MemoryMiB = 128 })
	g.run("hog", "echo 1000000 > /proc/sys/vm/min_free_kbytes", nil)
	silent := &output{streams: &agentv1.Streams{}}
	for i := 0; g.vm.Err() == nil; i++ {
		if g.ctx.Err() != nil {
			t.Fatal("the guest goes on")
		}
		// Each takes some of what is left; some fail, and in the end all do.
		g.create(fmt.Sprint("c", i), "sleep 1000", nil, silent) //nolint:errcheck // see above
	}
	if err := g.vm.Err(); !errors.Is(err, hypervisor.ErrGuestOOM) {
		t.Errorf("the VM's end: %v", err)
	}
}
