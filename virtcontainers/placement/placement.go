// Package placement decides on which CPUs of the host a VM's threads run, and on which
// of its vCPUs a container runs, so that each container keeps to the CPUs of the host
// that it is bound to.
package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// A Host is what CPUs and memory nodes the host has.
type Host struct {
	// CPUs are those in use, ascending.
	CPUs []int
	// Nodes are the CPUs of each memory node, ascending. A node may have none.
	Nodes map[int][]int
}

// A Container is bound to CPUs and memory nodes of the host.
type Container struct {
	ID string
	// CPUs and Mems are lists such as "0-2,7", as the OCI spec has them; empty: any.
	CPUs, Mems string
	// NanoCPUs is its CPU limit, in billionths of a CPU; 0: none.
	NanoCPUs int64
}

// A Plan is where everything runs. Lists of CPUs are ascending; nil is any.
type Plan struct {
	// VCPUs are the host's CPUs of each vCPU.
	VCPUs [][]int
	// Containers are the vCPUs of each container, by id, as a list; empty: all.
	Containers map[string]string
	// Helpers are the host's CPUs for all other threads of the VM's processes.
	Helpers []int
	// Nodes are the host's memory nodes for the guest's memory, ascending; nil: any.
	Nodes []int
}

// CPUs are the host's that vCPUs are bound to, ascending; nil: one may run on any.
func (p Plan) CPUs() []int {
	var all []int
	for _, cpus := range p.VCPUs {
		if cpus == nil {
			return nil
		}
		all = append(all, cpus...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// A cell are the CPUs of the host that the same containers are bound to.
type cell struct {
	cpus  []int
	users []int // indexes of containers, ascending
	vcpus []int
}

func (c *cell) room() int { return len(c.cpus) - len(c.vcpus) }

// Place returns the plan of a VM with so many vCPUs. It depends on nothing else, and
// not on the order of the containers.
//
// The CPUs that the containers are bound to fall into cells. Each cell has from one to
// as many vCPUs as CPUs, bound to the cell as a whole, or with pin, where it has as many
// as CPUs, to one each. A container runs on the vCPUs of its cells. vCPUs go first
// where the CPU limits of the containers need them, then to the cells with the most
// CPUs left; any that are over are not bound. Where there are fewer vCPUs than cells,
// only so many cells are used as leave each container one of its own.
//
// All but vCPUs keeps off CPUs that a vCPU is pinned to, as long as the host has
// others.
//
// The error is InvalidArgument for a list that is none, and FailedPrecondition for
// CPUs or nodes that the host does not have, for more separate sets of CPUs than there
// are vCPUs, and for containers without a memory node in common.
func Place(h Host, vcpus int, pin bool, containers []Container) (Plan, error) {
	containers = slices.SortedFunc(slices.Values(containers), func(a, b Container) int { return cmp.Compare(a.ID, b.ID) })
	bound := make([][]int, len(containers)) // CPUs of each container, nil: any
	for i, c := range containers {
		var err error
		if bound[i], err = lookup(c.CPUs, h.CPUs, "CPU"); err != nil {
			return Plan{}, fmt.Errorf("container %s: cpuset %q: %w", c.ID, c.CPUs, err)
		}
	}
	cells, err := choose(split(bound), bound, containers, vcpus)
	if err != nil {
		return Plan{}, err
	}
	spread(cells, bound, containers, vcpus)

	p := Plan{VCPUs: make([][]int, vcpus), Containers: map[string]string{}}
	var pinned []int
	next := 0
	for _, c := range cells {
		n := len(c.vcpus)
		for i := range n {
			c.vcpus[i] = next
			p.VCPUs[next] = c.cpus
			if pin && n == len(c.cpus) {
				p.VCPUs[next] = c.cpus[i : i+1]
				pinned = append(pinned, c.cpus[i])
			}
			next++
		}
	}
	if rest := without(h.CPUs, pinned); len(pinned) > 0 && len(rest) > 0 {
		p.Helpers = rest
	}
	for i := next; i < vcpus; i++ {
		p.VCPUs[i] = p.Helpers
	}
	for i, c := range containers {
		p.Containers[c.ID] = ""
		if bound[i] == nil {
			continue
		}
		var own []int
		for _, cell := range cells {
			if slices.Contains(cell.users, i) {
				own = append(own, cell.vcpus...)
			}
		}
		if len(own) < vcpus {
			slices.Sort(own)
			p.Containers[c.ID] = FormatList(own)
		}
	}
	if p.Nodes, err = nodes(h, containers, p.VCPUs); err != nil {
		return Plan{}, err
	}
	return p, nil
}

// lookup reads a list of what the host has; nil is none given.
func lookup(list string, has []int, what string) ([]int, error) {
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	want, err := ParseList(list)
	if err != nil {
		return nil, err
	}
	if missing := without(want, has); len(missing) > 0 {
		return nil, fmt.Errorf("the host has no %s %s in use; it has %s: %w", what, FormatList(missing), FormatList(has), errdefs.ErrFailedPrecondition)
	}
	return want, nil
}

// split returns the cells, by their first CPU.
func split(bound [][]int) []*cell {
	users := map[int][]int{} // of each CPU
	for i, cpus := range bound {
		for _, cpu := range cpus {
			users[cpu] = append(users[cpu], i)
		}
	}
	var cells []*cell
	for _, cpu := range slices.Sorted(maps.Keys(users)) {
		i := slices.IndexFunc(cells, func(c *cell) bool { return slices.Equal(c.users, users[cpu]) })
		if i < 0 {
			cells = append(cells, &cell{users: users[cpu]})
			i = len(cells) - 1
		}
		cells[i].cpus = append(cells[i].cpus, cpu)
	}
	return cells
}

// choose returns the cells that get a vCPU, each with one: all, or, where those are too
// few, one after the other the cell of most containers that have none, and then the
// largest.
func choose(all []*cell, bound [][]int, containers []Container, vcpus int) ([]*cell, error) {
	served := make([]bool, len(bound))
	var ids []string
	for i, cpus := range bound {
		if served[i] = cpus == nil; !served[i] {
			ids = append(ids, containers[i].ID)
		}
	}
	left := slices.Clone(all)
	var chosen []*cell
	for len(left) > 0 && (len(chosen) < vcpus || slices.Contains(served, false)) {
		news := func(c *cell) (n int) {
			for _, u := range c.users {
				if !served[u] {
					n++
				}
			}
			return n
		}
		best := slices.MaxFunc(left, func(a, b *cell) int {
			return cmp.Or(cmp.Compare(news(a), news(b)), cmp.Compare(len(a.cpus), len(b.cpus)), cmp.Compare(b.cpus[0], a.cpus[0]))
		})
		left = slices.DeleteFunc(left, func(c *cell) bool { return c == best })
		chosen = append(chosen, best)
		for _, u := range best.users {
			served[u] = true
		}
	}
	if len(chosen) > vcpus {
		return nil, fmt.Errorf("containers %s are bound to %d sets of the host's CPUs, each of which needs a vCPU, and the VM has %d: raise the pod's CPU limit, or bind containers to the same CPUs: %w",
			strings.Join(ids, ", "), len(chosen), vcpus, errdefs.ErrFailedPrecondition)
	}
	slices.SortFunc(chosen, func(a, b *cell) int { return cmp.Compare(a.cpus[0], b.cpus[0]) })
	for _, c := range chosen {
		c.vcpus = make([]int, 1, len(c.cpus))
	}
	return chosen, nil
}

// spread gives cells the other vCPUs.
func spread(cells []*cell, bound [][]int, containers []Container, vcpus int) {
	for n := len(cells); n < vcpus; n++ {
		c := roomiest(neediest(cells, bound, containers))
		if c == nil {
			c = roomiest(cells)
		}
		if c == nil {
			return
		}
		c.vcpus = append(c.vcpus, 0)
	}
}

// neediest returns the cells of those containers, bound to the same CPUs, which lack
// most to have as many vCPUs as their limits come to.
func neediest(cells []*cell, bound [][]int, containers []Container) (most []*cell) {
	lack := 0
	for i, cpus := range bound {
		if cpus == nil {
			continue
		}
		var limit int64
		for j := range bound {
			if slices.Equal(bound[j], cpus) {
				limit += min(containers[j].NanoCPUs, 1<<40)
			}
		}
		var own []*cell
		has := 0
		for _, c := range cells {
			if slices.Contains(c.users, i) {
				own, has = append(own, c), has+len(c.vcpus)
			}
		}
		if n := int((limit+nano-1)/nano) - has; n > lack && roomiest(own) != nil {
			lack, most = n, own
		}
	}
	return most
}

const nano = 1_000_000_000

// roomiest returns the cell with the most room, the first of equals; nil: none has any.
func roomiest(cells []*cell) (best *cell) {
	for _, c := range cells {
		if c.room() > 0 && (best == nil || c.room() > best.room()) {
			best = c
		}
	}
	return best
}

// nodes returns those that every container may have its memory on, and of these the one
// that all vCPUs are bound to, if there is one.
func nodes(h Host, containers []Container, vcpus [][]int) ([]int, error) {
	all := slices.Sorted(maps.Keys(h.Nodes))
	common := all
	var ids []string
	for _, c := range containers {
		mems, err := lookup(c.Mems, all, "memory node")
		if err != nil {
			return nil, fmt.Errorf("container %s: cpuset memory nodes %q: %w", c.ID, c.Mems, err)
		}
		if mems == nil {
			continue
		}
		ids = append(ids, c.ID)
		if common = without(common, without(common, mems)); len(common) == 0 {
			return nil, fmt.Errorf("containers %s are bound to memory nodes of which none is common to all, and a VM's memory is one: bind them to a common one: %w",
				strings.Join(ids, ", "), errdefs.ErrFailedPrecondition)
		}
	}
	for _, node := range common {
		if !slices.ContainsFunc(vcpus, func(cpus []int) bool { return cpus == nil || len(without(cpus, h.Nodes[node])) > 0 }) {
			return []int{node}, nil
		}
	}
	if len(common) == len(all) {
		return nil, nil
	}
	return common, nil
}

// without returns what of all is not in some.
func without(all, some []int) []int {
	return slices.DeleteFunc(slices.Clone(all), func(n int) bool { return slices.Contains(some, n) })
}
