package capacity

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/resource"
)

// A plan is a placement; nil binds nobody.
type plan struct{ placement.Plan }

// cpus are the guest's CPUs that a container is confined to; empty: all.
func (p *plan) cpus(id string) string {
	if p == nil {
		return ""
	}
	return p.Containers[id]
}

func (p *plan) nodes() []int {
	if p == nil {
		return nil
	}
	return p.Nodes
}

// place plans where the VM runs. As long as no container was bound to anything there is
// no plan: the host's scheduler decides.
func (t *Table) place(vcpus int, claims map[string]Claim) (*plan, error) {
	_, old := t.current()
	var list []placement.Container
	bound := old != nil
	for id, c := range claims {
		limits, err := resource.OfSpec(c.Resources)
		if err != nil {
			return nil, err
		}
		list = append(list, placement.Container{ID: id, CPUs: c.CPUs, Mems: c.Mems, NanoCPUs: limits.NanoCPUs})
		bound = bound || c.CPUs != "" || c.Mems != ""
	}
	if !bound {
		return nil, nil
	}
	p, err := placement.Place(t.o.Boot.Host, vcpus, t.o.Boot.Pin, list)
	if err != nil {
		return nil, err
	}
	return &plan{p}, nil
}

// enact makes a plan hold, but for the container of that id, which another confines.
// Without a plan all is as it was when there was none.
func (t *Table) enact(ctx context.Context, p *plan, but string) error {
	claims, old := t.current()
	if p == nil && old == nil {
		return nil
	}
	threads, err := t.o.Machine.VCPUThreads(ctx)
	if err != nil {
		return fmt.Errorf("find the vCPUs' threads: %w", err)
	}
	t.mu.Lock()
	t.plan = p // what fails is undone by another plan
	t.mu.Unlock()
	apply := placement.Plan{VCPUs: make([][]int, len(threads))}
	if p != nil {
		apply = p.Plan
		// vCPUs that are about to go stay where they are.
		maps.DeleteFunc(threads, func(number, _ int) bool { return number >= len(p.VCPUs) })
	}
	errs := []error{apply.Apply(threads, t.o.Processes())}
	if !slices.Equal(p.nodes(), old.nodes()) {
		errs = append(errs, t.o.BindMemory(p.nodes()))
	}
	for _, id := range slices.Sorted(maps.Keys(claims)) {
		if id != but && p.cpus(id) != old.cpus(id) {
			errs = append(errs, t.o.Confine(ctx, id, p.cpus(id)))
		}
	}
	return errors.Join(errs...)
}
