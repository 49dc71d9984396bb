package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// statsCalls is how many calls a cost is measured by.
	statsCalls = 15
	// statsCeiling is for the median of one call by CRI on a busy machine without KVM.
	statsCeiling = 500 * time.Millisecond
	// statsGrain is what version 1 of cgroups counts user and system time in, and a little.
	statsGrain = 100 * time.Millisecond
	// statsLimit is for a call beside a container that is stuck.
	statsLimit = 5 * time.Second
)

// listStats is what CRI tells of all containers of a pod at once, by their ids.
func (p *pod) listStats() map[string]*runtime.ContainerStats {
	p.e.Helper()
	ctx, cancel := p.e.call()
	defer cancel()
	r, err := p.e.cri.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{Filter: &runtime.ContainerStatsFilter{PodSandboxId: p.id}})
	if err != nil {
		p.e.Fatalf("stats of containers: %v", err)
	}
	list := map[string]*runtime.ContainerStats{}
	for _, s := range r.Stats {
		list[s.Attributes.Id] = s
	}
	return list
}

// near wants bytes to be so many MiB, or up to slack more.
func (e *env) near(what string, bytes uint64, wantMiB, slackMiB uint64) {
	e.Helper()
	if bytes < wantMiB*mib || bytes > (wantMiB+slackMiB)*mib {
		e.Errorf("%s is %d bytes, %d MiB; want %d to %d MiB", what, bytes, bytes/mib, wantMiB, wantMiB+slackMiB)
	}
}

// TestStatsOfContainersThatDiffer has each do one thing alone, and wants that it is
// told of that one.
func TestStatsOfContainersThatDiffer(t *testing.T) {
	const large = 80 // MiB
	each(t, setup{}, func(e *env) {
		p := e.run("stats", asks(1000, 512))
		holder := p.start("holder", fmt.Sprintf("exec /hog memory %d", large), e.hog(), limits(0, 2*large))
		writer := p.start("writer", fmt.Sprintf("exec /hog cache /file %d", large), e.hog(), limits(0, 2*large))
		threads := p.start("threads", "exec /hog threads 40", e.hog(), limits(0, 64))
		// The burners last: they are in the others' way.
		user := p.start("user", "exec /hog cpu user", e.hog(), limits(250, 64))
		system := p.start("system", "exec /hog cpu system", e.hog(), limits(250, 64))
		for _, c := range []*container{holder, writer, threads, user, system} {
			c.ready()
		}

		// CPU, the right way round, and of those that burn it alone.
		for _, tt := range []struct {
			name string
			c    *container
			more func(u usage) (more, less time.Duration)
		}{
			{"user", user, func(u usage) (time.Duration, time.Duration) { return u.user, u.system }},
			{"system", system, func(u usage) (time.Duration, time.Duration) { return u.system, u.user }},
		} {
			var before usage = tt.c.usage()
			e.within(time.Minute, "CPU for the burner of "+tt.name, func(context.Context) error {
				u := tt.c.usage()
				more, less := tt.more(usage{user: u.user - before.user, system: u.system - before.system})
				if more+less < 300*time.Millisecond {
					return fmt.Errorf("%v of one, %v of the other", more, less)
				}
				if more < 3*less {
					e.Fatalf("the burner of %s has used %v of it, and %v of the other", tt.name, more, less)
				}
				return nil
			})
		}
		stats := p.listStats()
		if len(stats) != 5 {
			e.Errorf("stats are of %d containers", len(stats))
		}
		cpu := func(c *container) time.Duration {
			return time.Duration(stats[c.id].GetCpu().GetUsageCoreNanoSeconds().GetValue())
		}
		if u := user.usage(); cpu(user) == 0 || cpu(user) > u.user+u.system+statsGrain {
			e.Errorf("CRI has %v of CPU for the burner, containerd later %v", cpu(user), u.user+u.system)
		}
		if cpu(threads)*2 > cpu(user) {
			e.Errorf("a container that sleeps has used %v of CPU, a burner %v", cpu(threads), cpu(user))
		}

		// Memory: what is taken is in the working set, what is only cached is not.
		h, r := holder.usage(), writer.usage()
		e.near("anonymous memory of its holder", h.anon, large, 8)
		e.near("usage of the holder", h.memory, large, 24)
		e.near("working set of the holder", stats[holder.id].GetMemory().GetWorkingSetBytes().GetValue(), large, 24)
		if r.anon > 16*mib {
			e.Errorf("the writer of a file has %d bytes of anonymous memory", r.anon)
		}
		working := stats[writer.id].GetMemory().GetWorkingSetBytes().GetValue()
		usage := stats[writer.id].GetMemory().GetUsageBytes().GetValue()
		e.Logf("a writer of %d MiB: usage %d MiB, file %d MiB, inactive %d MiB, working set %d MiB",
			large, usage/mib, r.file/mib, r.inactiveFile/mib, working/mib)
		e.near("cached files of the writer", r.file, large*9/10, 24)
		if r.inactiveFile < large/2*mib || working > large/2*mib {
			e.Errorf("of %d MiB of a file that was written once %d bytes are inactive, and the working set is %d", large, r.inactiveFile, working)
		}
		// How much of it is inactive changes between the two calls.
		if want := usage - r.inactiveFile; working > want+16*mib || working+16*mib < want {
			e.Errorf("working set of the writer is %d bytes, of a usage of %d with %d inactive", working, usage, r.inactiveFile)
		}

		// A Go program has a few threads of its own.
		if n := threads.usage().pids; n < 41 || n > 60 {
			e.Errorf("%d processes and threads, want 41 and a few", n)
		}

		// The pod is its containers together.
		all := p.criStats().GetLinux()
		if len(all.GetContainers()) != 5 {
			e.Errorf("the pod's stats are of %d containers", len(all.GetContainers()))
		}
		if e.generation == "2.4" { // 1.6 asks for processes, which are fewer than threads
			if n := all.GetProcess().GetProcessCount().GetValue(); n < 45 || n > 120 {
				e.Errorf("the pod has %d processes", n)
			}
		}

		// What a call costs.
		var took []time.Duration
		for range statsCalls {
			began := time.Now()
			user.criStats()
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		e.Logf("a call of ContainerStats beside two burners: median %v of %d, worst %v", took[len(took)/2], len(took), took[len(took)-1])
		if took[len(took)/2] > statsCeiling*patience() {
			e.Errorf("half of the calls took more than %v", took[len(took)/2])
		}
		p.remove()
		e.settled()
	})
}

// TestStatsOfNetworkAndFiles has bytes be counted where they are.
func TestStatsOfNetworkAndFiles(t *testing.T) {
	const sent = 8 // MiB
	each(t, setup{tasks: true}, func(e *env) {
		p := e.run("bytes", asks(1000, 256))
		a := p.start("a", fmt.Sprintf("mkdir /www; head -c %d /dev/zero > /www/file; cd /www; exec httpd -f -p 8080", sent*mib), limits(0, 64))
		b := p.start("b", idle, limits(0, 64))
		a.eventually("wget -q -O - http://127.0.0.1:8080/file | wc -c", fmt.Sprint(sent*mib))

		network := func() *runtime.NetworkInterfaceUsage {
			e.Helper()
			n := p.criStats().GetLinux().GetNetwork().GetDefaultInterface()
			if n.GetName() != "eth0" {
				e.Errorf("the default interface is %q", n.GetName())
			}
			return n
		}
		before := network()
		e.node(fmt.Sprintf("busybox wget -q -O /dev/null http://%s:8080/file", p.ip4()))
		// The other way.
		l, err := listenIn(e.d.NetNS(), node4+":9000")
		e.must(err)
		received := make(chan int)
		go func() { // ends with the connection
			n := 0
			defer func() { received <- n }()
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			for buf := make([]byte, 64<<10); err == nil; {
				var k int
				k, err = conn.Read(buf)
				n += k
			}
		}()
		a.sh(fmt.Sprintf("nc %s 9000 < /www/file", node4))
		if n := <-received; n != sent*mib {
			e.Errorf("%d bytes were received", n)
		}
		l.Close()
		after := network()
		tx, rx := after.GetTxBytes().GetValue()-before.GetTxBytes().GetValue(), after.GetRxBytes().GetValue()-before.GetRxBytes().GetValue()
		e.near("bytes sent", tx, 2*sent, sent/2)
		if rx == 0 || rx > sent*mib {
			e.Errorf("%d bytes were received while %d MiB were sent", rx, 2*sent)
		}

		// The writable layer. containerd looks at it every ten seconds.
		a.sh("mkdir /many; cd /many; touch $(seq 100)")
		e.within(time.Minute, "the writable layer is that of what was written", func(context.Context) error {
			l := a.criStats().GetWritableLayer()
			if l.GetUsedBytes().GetValue() < sent*mib || l.GetInodesUsed().GetValue() < 102 || l.GetInodesUsed().GetValue() > 150 {
				return fmt.Errorf("it has %d bytes, %d inodes", l.GetUsedBytes().GetValue(), l.GetInodesUsed().GetValue())
			}
			return nil
		})
		if l := b.criStats().GetWritableLayer(); l.GetUsedBytes().GetValue() > sent*mib/2 || l.GetInodesUsed().GetValue() > 50 {
			e.Errorf("the writable layer of the other container has %d bytes, %d inodes", l.GetUsedBytes().GetValue(), l.GetInodesUsed().GetValue())
		}
		p.remove()
		e.settled()
	})
}

// TestStatsBesideAContainerThatIsStuck: they are answered, and right.
func TestStatsBesideAContainerThatIsStuck(t *testing.T) {
	each(t, setup{once: true}, func(e *env) {
		p := e.run("stuck", asks(1000, 256))
		sibling := p.start("sibling", idle, limits(0, 64))
		// One is frozen, one is out of memory again and again, one has ended.
		frozen := p.start("frozen", idle, limits(0, 64))
		looping := p.start("looping", "while :; do /hog memory 64; done", e.hog(), limits(0, 24))
		ended := p.start("ended", "true")
		ended.exited()
		e.must(frozen.pause())
		soon := func(what string, call func() error) {
			e.Helper()
			began := time.Now()
			if err := call(); err != nil {
				e.Errorf("%s: %v", what, err)
			}
			if took := time.Since(began); took > statsLimit*patience() {
				e.Errorf("%s took %v", what, took)
			}
		}
		ofSibling := func(s *runtime.ContainerStats) error {
			if s.GetMemory().GetUsageBytes().GetValue() == 0 || s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
				return fmt.Errorf("stats are %v", s)
			}
			return nil
		}
		for range 3 {
			soon("stats of the sibling", func() error { return ofSibling(sibling.criStats()) })
			soon("stats of all", func() error {
				list := p.listStats()
				if list[frozen.id] == nil || list[looping.id] == nil {
					return errors.New("those of a container that is there are missing")
				}
				return ofSibling(list[sibling.id])
			})
			soon("stats of the pod", func() error {
				if p.criStats().GetLinux() == nil {
					return errors.New("none")
				}
				return nil
			})
			soon("metrics of what is frozen", func() error {
				_, err := frozen.tryUsage()
				return err
			})
		}
		if _, err := ended.tryUsage(); err != nil && strings.Contains(err.Error(), "timeout") {
			e.Errorf("metrics of what has ended: %v", err)
		}
		e.must(frozen.resume())
		p.remove()
		e.settled()
	})
}
