package node

import (
	"fmt"
	"slices"
	"strings"

	"github.com/husk-containers/husk/test/daemon"
)

// What a pod's memory is counted to, beside the names of processes.
const (
	GuestRAM   = "guest's RAM"
	Everything = "**all**"
)

// A Footprint is the KiB of one pod by what holds them.
type Footprint map[string]int

// Weigh reads the memory of a pod's processes.
func Weigh(processes []daemon.Process) (Footprint, error) {
	f := Footprint{}
	for _, p := range processes {
		m, err := p.Memory()
		if err != nil {
			return nil, fmt.Errorf("memory of %v: %w", p, err)
		}
		f[p.Name] += m.Own
		f[Everything] += m.Own + m.Guest
		if m.Guest > 0 {
			f[GuestRAM] += m.Guest
		}
	}
	return f, nil
}

// Holders lists all that the memory of some pod is counted to, the sum last.
func Holders[K comparable](found map[K][]Footprint) []string {
	var names []string
	for _, footprints := range found {
		for _, f := range footprints {
			for name := range f {
				if !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if (a == Everything) != (b == Everything) {
			return map[bool]int{true: 1, false: -1}[a == Everything]
		}
		return strings.Compare(a, b)
	})
	return names
}
