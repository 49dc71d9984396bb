package status

import (
	"fmt"
	"slices"
	"strings"

	"github.com/husk-containers/husk/internal/cpulist"
)

// relate finds which of the pods share CPUs with p, and what interferes with its pinned
// vCPUs.
func relate(p *Pod, pods []*Pod, online cpulist.Set) (shares []Share, warnings []string) {
	own, pinned := p.anywhere(), p.pinned(online)
	var both, free crowd
	for _, o := range pods {
		common := own.And(o.anywhere())
		if o.Name() == p.Name() || len(common) == 0 {
			continue
		}
		theirs := o.pinned(online)
		shares = append(shares, Share{Namespace: o.Namespace, ID: o.ID, CPUs: common, Pinned: common.And(pinned.Union(theirs))})
		both.add(o, pinned.And(theirs))
		free.add(o, slices.DeleteFunc(pinned.And(common), func(n int) bool { return slices.Contains(theirs, n) }))
	}
	for _, cpus := range both.lists {
		warnings = append(warnings, fmt.Sprintf("vCPUs of %s are pinned to %s too", both.names(cpus), named(cpus)))
	}
	for _, cpus := range free.lists {
		warnings = append(warnings, fmt.Sprintf("%s may run on %s, to which vCPUs of this pod are pinned", free.names(cpus), named(cpus)))
	}
	var names []string
	var where cpulist.Set
	for _, process := range p.Processes {
		if common := process.cpus().And(pinned); len(common) > 0 {
			names, where = append(names, process.Name), where.Union(common)
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		warnings = append(warnings, fmt.Sprintf("the pod's own %s may run on %s, to which its vCPUs are pinned",
			strings.Join(slices.Compact(names), ", "), named(where)))
	}
	return shares, warnings
}

// A crowd is pods by what CPUs they interfere on.
type crowd struct {
	lists []cpulist.Set // in order of the first pod of each
	pods  map[string][]string
}

func (c *crowd) add(p *Pod, cpus cpulist.Set) {
	if len(cpus) == 0 {
		return
	}
	if c.pods == nil {
		c.pods = map[string][]string{}
	}
	key := cpus.String()
	if c.pods[key] == nil {
		c.lists = append(c.lists, cpus)
	}
	c.pods[key] = append(c.pods[key], p.Name())
}

// most is how many pods a warning names; Shares have all.
const most = 4

func (c *crowd) names(cpus cpulist.Set) string {
	all := c.pods[cpus.String()]
	if len(all) > most {
		return fmt.Sprintf("%s and %d more pods", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}

func named(cpus cpulist.Set) string {
	if len(cpus) == 1 {
		return "CPU " + cpus.String()
	}
	return "CPUs " + cpus.String()
}
