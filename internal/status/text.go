package status

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/husk-containers/husk/internal/cpulist"
)

// none stands where nothing is known.
const none = "-"

// shortID is how much of the ids of Kubernetes' pods, of 64 digits, a table shows.
const shortID = 13

// WriteTable writes a line for each pod, and below them what could not be found out.
func WriteTable(w io.Writer, pods []*Pod) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row(t, "NAMESPACE", "ID", "STATE", "VCPUS", "MEMORY", "HOST MEMORY", "CPUS", "AGE")
	for _, p := range pods {
		vcpus, memory := sizes(p)
		row(t, p.Namespace, short(p.ID), p.State, vcpus, memory, mib(p.Memory.PSSKiB), list(p.CPUs), age(p))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range pods {
		notes(w, p.Namespace+"/"+short(p.ID)+": ", p)
	}
	return nil
}

// WritePod writes all that is known of a pod.
func WritePod(w io.Writer, p *Pod) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row(t, "Pod", p.Name())
	state := p.State
	if p.Accelerator != "" {
		state += ", " + p.Accelerator
	}
	row(t, "State", state)
	row(t, "Age", age(p))
	if vcpus, memory := sizes(p); p.Size != nil {
		row(t, "vCPUs", vcpus)
		row(t, "Memory", memory)
	}
	m := p.Memory
	row(t, "Host memory", fmt.Sprintf("%s: anonymous %s, files %s, shared %s", mib(m.PSSKiB), mib(m.AnonymousKiB), mib(m.FileKiB), mib(m.SharedKiB)))
	row(t, "CPUs", list(p.CPUs)+placement(p.Placement))
	row(t, "NUMA nodes", list(p.Nodes))
	for _, c := range cgroups(p) {
		row(t, "Cgroup", c)
	}
	for _, x := range p.Pressure {
		row(t, "Pressure", fmt.Sprintf("%s of the %s: some %.1f %%, full %.1f %% (10 s); some %.1f %%, full %.1f %% (60 s)", x.Resource, x.Of, x.Some10, x.Full10, x.Some60, x.Full60))
	}
	if len(p.Containers) > 0 {
		row(t)
		row(t, "CONTAINER", "STATE")
		for _, c := range p.Containers {
			row(t, c.ID, c.State)
		}
	}
	if len(p.VCPUs) > 0 {
		row(t)
		row(t, "VCPU", "THREAD", "CPUS", "LAST CPU")
		for _, v := range p.VCPUs {
			row(t, v.Number, v.Thread, list(v.CPUs), v.LastCPU)
		}
	}
	if len(p.Processes) > 0 {
		row(t)
		row(t, "PROCESS", "PID", "THREADS", "CPUS", "LAST CPUS", "MEMORY", "ANONYMOUS", "FILES", "SHARED", "NUMA NODES")
		for _, one := range p.Processes {
			threads, cpus := affinities(one.Affinities)
			row(t, one.Name, one.PID, threads, cpus, list(one.LastCPUs),
				mib(one.Memory.PSSKiB), mib(one.Memory.AnonymousKiB), mib(one.Memory.FileKiB), mib(one.Memory.SharedKiB), nodes(one.NodeKiB))
		}
	}
	if len(p.Shares) > 0 {
		row(t)
		row(t, "SHARES CPUS", "PINNED", "WITH")
		for _, s := range grouped(p.Shares) {
			row(t, s...)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(p.Warnings)+len(p.Unknown) > 0 {
		fmt.Fprintln(w)
	}
	notes(w, "", p)
	return nil
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, c)
	}
	fmt.Fprintln(w)
}

func notes(w io.Writer, prefix string, p *Pod) {
	for _, text := range p.Warnings {
		fmt.Fprintf(w, "warning: %s%s\n", prefix, text)
	}
	for _, text := range p.Unknown {
		fmt.Fprintf(w, "unknown: %s%s\n", prefix, text)
	}
}

func short(id string) string {
	if len(id) == 64 && strings.Trim(id, "0123456789abcdef") == "" {
		return id[:shortID]
	}
	return id
}

// sizes are what the VM has, and what it can grow to where that is more.
func sizes(p *Pod) (vcpus, memory string) {
	if p.Size == nil {
		return none, none
	}
	vcpus, memory = fmt.Sprint(p.Size.VCPUs), fmt.Sprint(p.Size.MemoryMiB)
	if p.Maximum != nil && p.Maximum.VCPUs > p.Size.VCPUs {
		vcpus += fmt.Sprint("/", p.Maximum.VCPUs)
	}
	if p.Maximum != nil && p.Maximum.MemoryMiB > p.Size.MemoryMiB {
		memory += fmt.Sprint("/", p.Maximum.MemoryMiB)
	}
	return vcpus, memory + " MiB"
}

func mib(kib int64) string { return fmt.Sprintf("%.1f MiB", float64(kib)/1024) }

func list(s cpulist.Set) string { return cmp.Or(s.String(), none) }

// age is as kubectl has it: two units at most.
func age(p *Pod) string {
	if p.AgeSeconds == nil {
		return none
	}
	d := time.Duration(*p.AgeSeconds) * time.Second
	switch days, hours := int(d.Hours())/24, int(d.Hours())%24; {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, hours)
	case hours > 0:
		return fmt.Sprintf("%dh%dm", hours, int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}

func placement(p *Placement) string {
	if p == nil {
		return ""
	}
	text := "; placed on CPUs " + cmp.Or(p.CPUs, "all") + " and NUMA nodes " + cmp.Or(p.MemoryNodes, "all")
	if p.Pinned {
		text += ", each vCPU pinned"
	}
	return text
}

// cgroups are the paths, each with the hierarchies that have it.
func cgroups(p *Pod) []string {
	var paths []string
	by := map[string][]string{}
	for _, c := range p.Cgroups {
		if by[c.Path] == nil {
			paths = append(paths, c.Path)
		}
		by[c.Path] = append(by[c.Path], cmp.Or(c.Controllers, "v2"))
	}
	for i, path := range paths {
		paths[i] = path + " (" + strings.Join(by[path], ", ") + ")"
	}
	return paths
}

// affinities are the number of threads and where they may run: "0-1", or "0-1 (3), 1 (1)"
// where that differs.
func affinities(all []Affinity) (threads int, cpus string) {
	var parts []string
	for _, a := range all {
		threads += a.Threads
		parts = append(parts, fmt.Sprintf("%s (%d)", list(a.CPUs), a.Threads))
	}
	if len(all) == 1 {
		return threads, list(all[0].CPUs)
	}
	return threads, cmp.Or(strings.Join(parts, ", "), none)
}

func nodes(kib map[int]int64) string {
	var parts []string
	for _, n := range slices.Sorted(maps.Keys(kib)) {
		parts = append(parts, fmt.Sprintf("%d (%s)", n, mib(kib[n])))
	}
	return cmp.Or(strings.Join(parts, ", "), none)
}

// grouped are rows: pods that share the same CPUs in one.
func grouped(shares []Share) [][]any {
	type key struct{ cpus, pinned string }
	var keys []key
	by := map[key][]string{}
	for _, s := range shares {
		k := key{list(s.CPUs), list(s.Pinned)}
		if by[k] == nil {
			keys = append(keys, k)
		}
		by[k] = append(by[k], s.Namespace+"/"+short(s.ID))
	}
	var rows [][]any
	for _, k := range keys {
		rows = append(rows, []any{k.cpus, k.pinned, strings.Join(by[k], ", ")})
	}
	return rows
}
