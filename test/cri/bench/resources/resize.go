package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

// resizeLimit is how long a container may take to see its new size.
const resizeLimit = 20 * time.Second

// What a pod that is resized begins with.
const (
	resizeMilliCPU = 1000
	resizeMiB      = 256
)

// A resize is from one size to another.
type resize struct {
	name          string
	milliCPU, mib int64 // what the container may use from then on
	cpu           bool  // whether it is of CPUs, and not of memory
}

// resizesInTurn end where they begin.
var resizesInTurn = []resize{
	{"1 more vCPU", resizeMilliCPU + 1000, resizeMiB, true},
	{"1 vCPU less", resizeMilliCPU, resizeMiB, true},
	{"256 MiB more", resizeMilliCPU, resizeMiB + 256, false},
	{"256 MiB less", resizeMilliCPU, resizeMiB, false},
	{"512 MiB more", resizeMilliCPU, resizeMiB + 512, false},
	{"512 MiB less", resizeMilliCPU, resizeMiB, false},
}

// What a container sees of its size: in a VM of the machine, under runc of its cgroup,
// of either version.
const (
	seesCPUs   = "nproc"
	seesMemory = "awk '/^MemTotal/ {print int($2/1024)}' /proc/meminfo"
	groupCPU   = "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/cpu.max"
	groupMem   = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max"
)

// resized is what resizes took: the call, until the container saw it, and the CPU of
// the pod's processes meanwhile.
type resized struct{ call, seen, cpu []time.Duration }

// resizing prints how long a pod takes to be resized.
func (n *bench) resizing(ctx context.Context, w io.Writer, p plan) error {
	pods, booted := map[string]*node.Pod{}, map[string]int{}
	took := map[string]map[string]*resized{}
	err := n.InTurn(ctx, 1, func(handler string) (err error) {
		if pods[handler], err = n.RunLimited(ctx, handler, node.Limits(resizeMilliCPU, resizeMiB)); err != nil {
			return err
		}
		took[handler] = map[string]*resized{}
		for _, r := range resizesInTurn {
			took[handler][r.name] = &resized{}
		}
		if _, err = pods[handler].Start(ctx, "resized", idle...); err == nil {
			booted[handler], err = sees(ctx, pods[handler], seesMemory)
		}
		return err
	})
	for range p.resizes {
		for _, r := range resizesInTurn {
			if err == nil {
				err = n.InTurn(ctx, 1, func(handler string) error {
					return resizePod(ctx, pods[handler], r, booted[handler], took[handler][r.name])
				})
			}
		}
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "### Resize of a pod of %d CPU and %d MiB by UpdateContainerResources: medians of %d interleaved pairs (least to most)\n\n", resizeMilliCPU/1000, resizeMiB, p.resizes)
	n.Header(w)
	for _, r := range resizesInTurn {
		for _, row := range []struct {
			name string
			of   func(*resized) []time.Duration
		}{
			{"the call", func(r *resized) []time.Duration { return r.call }},
			{"until an exec in the container has seen it", func(r *resized) []time.Duration { return r.seen }},
			{"CPU of the pod's processes during the call", func(r *resized) []time.Duration { return r.cpu }},
		} {
			n.Row(w, r.name+": "+row.name, func(handler string) string { return sample.Milliseconds(row.of(took[handler][r.name])) })
		}
	}
	fmt.Fprintf(w, "\nThe kernel tells CPU times in steps of %v. Under runc a resize is of the cgroup alone, and what is seen is the cgroup's limit; in Husk's VM it is `nproc` and MemTotal.\n\n", node.CPUGrain)
	return nil
}

// resizePod does one, in the pod's container, which had so many MiB of memory at first.
func resizePod(ctx context.Context, p *node.Pod, r resize, booted int, took *resized) error {
	before, err := p.CPUTime()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := update(ctx, p, node.Limits(r.milliCPU, r.mib)); err != nil {
		return fmt.Errorf("%s: %w", r.name, err)
	}
	called := time.Since(began)
	after, err := p.CPUTime()
	if err != nil {
		return err
	}
	script, want := wanted(p, r, booted)
	got := 0
	err = eventually(ctx, r.name, resizeLimit, func() (bool, error) {
		got, err = sees(ctx, p, script)
		return want(got), err
	})
	if err != nil {
		err = fmt.Errorf("%w: the container sees %d", err, got)
	}
	took.call, took.seen, took.cpu = append(took.call, called), append(took.seen, time.Since(began)), append(took.cpu, after-before)
	return err
}

// memoryBlockMiB is what Linux takes into use and out of it at a time, on amd64
// (Documentation/admin-guide/mm/memory-hotplug.rst): a VM may have so much more.
const memoryBlockMiB = 128

// wanted is what the container is to see after a resize, and by which script.
func wanted(p *node.Pod, r resize, booted int) (script string, want func(got int) bool) {
	equals := func(n int64) func(int) bool { return func(got int) bool { return int64(got) == n } }
	switch {
	case p.VM && r.cpu:
		return seesCPUs, equals(r.milliCPU / 1000)
	case p.VM:
		more := int(r.mib - resizeMiB)
		return seesMemory, func(got int) bool { return booted+more <= got && got <= booted+more+memoryBlockMiB }
	case r.cpu:
		return groupCPU, equals(node.Limits(r.milliCPU, 0).CpuQuota)
	}
	return groupMem, equals(r.mib << 20)
}

// sees is the number that a script prints in the pod's container.
func sees(ctx context.Context, p *node.Pod, script string) (int, error) {
	out, err := p.Node.Output(ctx, p.Containers[0], "sh", "-c", script)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}

// update changes what the pod's container may use.
func update(ctx context.Context, p *node.Pod, r *runtime.LinuxContainerResources) error {
	ctx, cancel := node.Call(ctx)
	defer cancel()
	_, err := p.Node.CRI.UpdateContainerResources(ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: p.Containers[0], Linux: r})
	if err != nil {
		return fmt.Errorf("update a container of %s: %w", p.Name, err)
	}
	return nil
}
