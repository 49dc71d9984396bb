package process

import (
	"fmt"
	"strconv"
	"strings"
)

// A Memory is a process's share of the memory that it has mapped, in KiB: of pages that
// several have mapped, its part (proportional set size).
type Memory struct {
	PSSKiB int64 `json:"pss_kib"`
	// What the process has to itself, what is of files, and what is shared, as the
	// memfd of a guest's RAM is. Kernels before 5.9 do not tell them apart: all are 0.
	AnonymousKiB int64 `json:"anonymous_kib"`
	FileKiB      int64 `json:"file_kib"`
	SharedKiB    int64 `json:"shared_kib"`
}

// Plus is the sum of two.
func (m Memory) Plus(o Memory) Memory {
	return Memory{m.PSSKiB + o.PSSKiB, m.AnonymousKiB + o.AnonymousKiB, m.FileKiB + o.FileKiB, m.SharedKiB + o.SharedKiB}
}

// Memory reads smaps_rollup, for which the kernel walks the page tables.
func (t Table) Memory(pid int) (Memory, error) {
	raw, err := t.file(strconv.Itoa(pid), "smaps_rollup")
	if err != nil {
		return Memory{}, err
	}
	var m Memory
	for line := range strings.Lines(raw) {
		key, value, _ := strings.Cut(line, ":")
		field := map[string]*int64{"Pss": &m.PSSKiB, "Pss_Anon": &m.AnonymousKiB, "Pss_File": &m.FileKiB, "Pss_Shmem": &m.SharedKiB}[key]
		if field == nil {
			continue
		}
		if *field, err = strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64); err != nil {
			return Memory{}, fmt.Errorf("parse smaps_rollup of process %d: %w", pid, err)
		}
	}
	return m, nil
}

// Nodes reads how much of a process's memory is on which NUMA node, in KiB. It is
// fs.ErrNotExist too where the kernel was built without NUMA.
func (t Table) Nodes(pid int) (map[int]int64, error) {
	raw, err := t.file(strconv.Itoa(pid), "numa_maps")
	if err != nil {
		return nil, err
	}
	nodes := map[int]int64{}
	for line := range strings.Lines(raw) {
		var pages [][2]int64
		var size int64
		for field := range strings.FieldsSeq(line) {
			key, value, found := strings.Cut(field, "=")
			switch {
			case key == "kernelpagesize_kB":
				size, err = strconv.ParseInt(value, 10, 64)
			case found && len(key) > 1 && key[0] == 'N' && strings.Trim(key[1:], "0123456789") == "":
				var node, n int64
				if node, err = strconv.ParseInt(key[1:], 10, 32); err == nil {
					n, err = strconv.ParseInt(value, 10, 64)
				}
				pages = append(pages, [2]int64{node, n})
			}
			if err != nil {
				return nil, fmt.Errorf("parse numa_maps of process %d: %w", pid, err)
			}
		}
		for _, p := range pages {
			nodes[int(p[0])] += p[1] * size
		}
	}
	return nodes, nil
}

// A Cgroup is where a process is in one hierarchy.
type Cgroup struct {
	// Controllers are those of version 1, a name=, or empty for version 2.
	Controllers string `json:"controllers"`
	Path        string `json:"path"`
}

// Cgroups lists where a process is, in every hierarchy.
func (t Table) Cgroups(pid int) ([]Cgroup, error) {
	raw, err := t.file(strconv.Itoa(pid), "cgroup")
	if err != nil {
		return nil, err
	}
	var all []Cgroup
	for line := range strings.Lines(raw) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			return nil, fmt.Errorf("parse cgroup of process %d: %q", pid, line)
		}
		all = append(all, Cgroup{Controllers: parts[1], Path: parts[2]})
	}
	return all, nil
}
