package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

// podSizes are the memory limits of the pods whose overhead is measured, in MiB.
var podSizes = []int64{128, 256, 512}

// looks are when a pod is looked at.
var looks = []string{"idle", "after load"}

// A column is the pods of one size, looked at at one time.
type column struct {
	size int64
	look string
}

// What a cgroup counts, as rows.
const (
	cgroupUsage  = "cgroup: usage"
	cgroupAnon   = "cgroup: anonymous and shared"
	cgroupFiles  = "cgroup: cache of files"
	cgroupKernel = "cgroup: kernel"
	memberAnon   = "PSS of the same, of what is in the cgroup"
)

// agreement is by how much the kernel's two ways to count the same memory may differ:
// so many hundredths, and so many KiB that it counts ahead for each CPU.
const (
	agreementPercent = 3
	agreementKiB     = 2048
)

// A need is the most that pods of one size have needed, in KiB.
type need struct {
	ram    int // the VM's, all of it
	beside int // held beside the guest's RAM, but for the cache of files
	held   int // held in all, but for the cache of files
}

// loadScript takes and frees so many MiB, writes 50 MiB of files and reads them, and
// runs 200 short processes.
const loadScript = `dd if=/dev/zero of=/dev/null bs=%dM count=1 2>/dev/null && mkdir /load &&
for i in $(seq 50); do dd if=/dev/zero of=/load/$i bs=1M count=1 2>/dev/null || exit; done &&
cat /load/* >/dev/null && for i in $(seq 200); do /bin/true || exit; done`

// loadPercent of a container's limit is what its load takes.
const loadPercent = 80

// overhead prints what pods with limits hold of the host's memory.
func (n *bench) overhead(ctx context.Context, w io.Writer, p plan) error {
	o := overheads{n: n, found: map[string]map[column][]node.Footprint{}, needs: map[int64]need{}}
	for range p.rounds {
		for _, size := range podSizes {
			if err := o.pair(ctx, size); err != nil {
				return fmt.Errorf("measure the overhead of pods of %d MiB: %w", size, err)
			}
		}
	}
	o.print(w, p.rounds)
	return errors.Join(o.wrong...)
}

// overheads are what was found.
type overheads struct {
	n     *bench
	found map[string]map[column][]node.Footprint // by handler
	needs map[int64]need                         // by size
	wrong []error                                // what does not agree
}

func (o *overheads) print(w io.Writer, rounds int) {
	fmt.Fprintf(w, "### Memory of a pod by its limit: on the host, in MiB, medians of %d pods (least to most)\n\n", rounds)
	head, line := "| | |", "|---|---|"
	for _, size := range podSizes {
		for _, look := range looks {
			head, line = head+fmt.Sprintf(" %d MiB, %s |", size, look), line+"---|"
		}
	}
	fmt.Fprintf(w, "%s\n%s\n", head, line)
	for _, handler := range o.n.Handlers {
		rows := node.Holders(o.found[handler])
		// The cgroup's stand behind the sum of the processes'.
		rows = slices.DeleteFunc(rows, func(row string) bool { return strings.HasPrefix(row, "cgroup") || row == memberAnon })
		for _, row := range append(rows, cgroupUsage, cgroupFiles, cgroupKernel, cgroupAnon, memberAnon) {
			fmt.Fprintf(w, "| %s | %s |", handler, row)
			for _, size := range podSizes {
				for _, look := range looks {
					var list []int
					for _, f := range o.found[handler][column{size, look}] {
						list = append(list, f[row])
					}
					fmt.Fprintf(w, " %s |", sample.Sizes(list))
				}
			}
			fmt.Fprintln(w)
		}
	}
	o.printNeeds(w)
}

// pair runs a pod of each handler, side by side, with a load in each in turn. They
// share no program, so that neither is lighter for the other's sake.
func (o *overheads) pair(ctx context.Context, size int64) error {
	n, pods := o.n, map[string]*node.Pod{}
	err := n.InTurn(ctx, 1, func(handler string) (err error) {
		if pods[handler], err = n.RunLimited(ctx, handler, node.Limits(0, size)); err == nil {
			_, err = pods[handler].Start(ctx, "loaded", idle...)
		}
		return err
	})
	look := func(what string) error {
		if err := node.Wait(ctx, settleTime); err != nil {
			return err
		}
		return n.InTurn(ctx, 1, func(handler string) error {
			f, err := o.inspect(pods[handler])
			if o.found[handler] == nil {
				o.found[handler] = map[column][]node.Footprint{}
			}
			at := column{size, what}
			o.found[handler][at] = append(o.found[handler][at], f)
			return err
		})
	}
	if err == nil {
		err = look(looks[0])
	}
	if err == nil {
		err = n.InTurn(ctx, 1, func(handler string) error {
			p := pods[handler]
			load := func() error {
				_, err := n.Output(ctx, p.Containers[0], "sh", "-c", fmt.Sprintf(loadScript, size*loadPercent/100))
				return err
			}
			if handler == node.Runc {
				return load()
			}
			return during(load, func() error { return o.need(p, size) })
		})
	}
	if err == nil {
		err = look(looks[1])
	}
	if err == nil {
		err = o.need(pods[n.Handlers[0]], size)
	}
	if err != nil {
		return err
	}
	return n.RemoveAll(ctx)
}

// inspect reads what the pod's processes hold, and what its cgroups say of it, and notes
// where the two do not agree.
func (o *overheads) inspect(p *node.Pod) (node.Footprint, error) {
	processes, err := p.Processes()
	if err != nil {
		return nil, err
	}
	f, err := node.Weigh(processes)
	if err != nil {
		return nil, err
	}
	c, err := p.Charge()
	if err != nil {
		return nil, err
	}
	in, anon, err := p.Members(processes)
	if err != nil {
		return nil, err
	}
	f[cgroupUsage], f[cgroupAnon], f[cgroupFiles], f[cgroupKernel], f[memberAnon] = c.Usage, c.Anon, c.Files, c.Kernel(), anon
	if off := max(c.Anon-anon, anon-c.Anon); off > agreementKiB+c.Anon*agreementPercent/100 {
		o.wrong = append(o.wrong, fmt.Errorf("the cgroup of %s says that its processes hold %d KiB, their smaps %d", p.Name, c.Anon, anon))
	}
	if p.VM && len(in) != len(processes) {
		o.wrong = append(o.wrong, fmt.Errorf("of the processes %v of %s the pod's cgroup has %v alone", processes, p.Name, in))
	}
	return f, nil
}

// need adds to the needs of pods of that size what this one holds now.
func (o *overheads) need(p *node.Pod, size int64) error {
	r, err := p.RAM()
	if err != nil {
		return err
	}
	c, err := p.Charge()
	if err != nil {
		return err
	}
	held := c.Usage - c.Files
	most := o.needs[size]
	o.needs[size] = need{ram: max(most.ram, r.Size), beside: max(most.beside, held-r.Held), held: max(most.held, held)}
	return nil
}

// overheadStep is what the RuntimeClass's figure is rounded up to, in MiB.
const overheadStep = 8

// printNeeds prints what a pod needs above its limit.
func (o *overheads) printNeeds(w io.Writer) {
	fmt.Fprint(w, "\nHow much a pod's cgroup has to allow above the limits of its containers, in MiB; the most that was seen, without the cache of files:\n\n")
	fmt.Fprint(w, "| limit | the VM's memory | held under load | above the limit | held beside the guest's RAM | above the limit once the guest has touched all of its RAM |\n|---|---|---|---|---|---|\n")
	worst := 0
	mib := func(kib int) string { return fmt.Sprintf("%.1f", float64(kib)/1024) }
	for _, size := range podSizes {
		limit, most := int(size<<10), o.needs[size]
		above := most.ram + most.beside - limit
		worst = max(worst, above)
		fmt.Fprintf(w, "| %d | %s | %s | %s | %s | **%s** |\n", size, mib(most.ram), mib(most.held), mib(most.held-limit), mib(most.beside), mib(above))
	}
	step := overheadStep << 10
	fmt.Fprintf(w, "\nSo the RuntimeClass's `overhead.podFixed.memory`, for what the kubelet limits the pod's cgroup to: **%dMi**.\n\n", (worst+step-1)/step*overheadStep)
}
