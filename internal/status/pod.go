// Package status is what an operator can see of the sandboxes of a host: their sizes and
// processes, where those run, and which pods share CPUs.
package status

import (
	"github.com/husk-containers/husk/internal/cpulist"
	"github.com/husk-containers/husk/internal/process"
)

// A Pod is one sandbox, as it was found. Its JSON is for programs: fields keep their
// names, and are left out where nothing is known.
type Pod struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	// State is "running", "paused", "ended" where its shim is gone, or "unknown".
	State       string `json:"state"`
	Accelerator string `json:"accelerator,omitempty"`
	// Size is what the VM has now, Maximum what it can grow to.
	Size       *Size  `json:"size,omitempty"`
	Maximum    *Size  `json:"maximum,omitempty"`
	AgeSeconds *int64 `json:"age_seconds,omitempty"`
	// Memory is what the host holds for the pod, in all its processes.
	Memory process.Memory `json:"memory"`
	// CPUs are those of the host that its vCPUs may run on or, where the vCPUs'
	// threads are not known, any of its threads; Nodes are the NUMA nodes of these.
	CPUs  cpulist.Set `json:"cpus"`
	Nodes cpulist.Set `json:"nodes"`
	// Placement is where the shim has put it.
	Placement  *Placement       `json:"placement,omitempty"`
	Containers []Container      `json:"containers,omitempty"`
	VCPUs      []VCPU           `json:"vcpus,omitempty"`
	Processes  []Process        `json:"processes,omitempty"`
	Cgroups    []process.Cgroup `json:"cgroups,omitempty"`
	Pressure   []Pressure       `json:"pressure,omitempty"`
	// Shares are the other pods that may run on CPUs that this one may run on.
	Shares []Share `json:"shares,omitempty"`
	// Warnings say, a line each, what interferes with pinned vCPUs; Unknown what
	// could not be found out, and why.
	Warnings []string `json:"warnings,omitempty"`
	Unknown  []string `json:"unknown,omitempty"`

	monitor int // QEMU's process id; 0: not found
}

// Name is the pod's, among those of all namespaces.
func (p *Pod) Name() string { return p.Namespace + "/" + p.ID }

// A Size is how large a VM is.
type Size struct {
	VCPUs     int `json:"vcpus"`
	MemoryMiB int `json:"memory_mib"`
}

// A Placement is what CPUs and NUMA nodes a pod was given, as lists.
type Placement struct {
	CPUs        string `json:"cpus"`
	MemoryNodes string `json:"memory_nodes"`
	Pinned      bool   `json:"pinned"`
}

// A Container is one of a pod's.
type Container struct {
	ID    string `json:"id"`
	State string `json:"state"` // created, running, paused or stopped
}

// A VCPU is a thread of the monitor that runs one of the guest's CPUs.
type VCPU struct {
	Number  int         `json:"number"`
	Thread  int         `json:"thread"`
	CPUs    cpulist.Set `json:"cpus"`
	LastCPU int         `json:"last_cpu"`
}

// A Process is one of a pod's on the host. Of the monitor the vCPUs' threads are left
// out: what is there then are its I/O threads.
type Process struct {
	Name       string         `json:"name"`
	PID        int            `json:"pid"`
	Affinities []Affinity     `json:"affinities"`
	LastCPUs   cpulist.Set    `json:"last_cpus"`
	Memory     process.Memory `json:"memory"`
	// NodeKiB is its memory by NUMA node.
	NodeKiB map[int]int64 `json:"node_kib,omitempty"`
}

// An Affinity is how many threads may run on what CPUs.
type Affinity struct {
	CPUs    cpulist.Set `json:"cpus"`
	Threads int         `json:"threads"`
}

// A Share is another pod that may run where this one may.
type Share struct {
	Namespace string      `json:"namespace"`
	ID        string      `json:"id"`
	CPUs      cpulist.Set `json:"cpus"`
	// Pinned are those of CPUs to which a vCPU of one of the two is pinned.
	Pinned cpulist.Set `json:"pinned"`
}

// anywhere is every CPU that a thread of the pod may run on.
func (p *Pod) anywhere() cpulist.Set {
	all := p.helpers()
	for _, v := range p.VCPUs {
		all = all.Union(v.CPUs)
	}
	return all
}

// helpers is every CPU that a thread other than the vCPUs' may run on.
func (p *Pod) helpers() cpulist.Set {
	var all cpulist.Set
	for _, process := range p.Processes {
		all = all.Union(process.cpus())
	}
	return all
}

func (p *Process) cpus() cpulist.Set {
	var all cpulist.Set
	for _, a := range p.Affinities {
		all = all.Union(a.CPUs)
	}
	return all
}

// pinned are the CPUs to which vCPUs are pinned: by the shim's word, or because a
// thread may run on one CPU only, of several that are online.
func (p *Pod) pinned(online cpulist.Set) cpulist.Set {
	var all cpulist.Set
	for _, v := range p.VCPUs {
		if p.Placement != nil && p.Placement.Pinned || len(v.CPUs) == 1 && len(online) > 1 {
			all = all.Union(v.CPUs)
		}
	}
	return all
}
