package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A hierarchy of the host's cgroups, as it is mounted.
type hierarchy struct {
	device string
	point  string // where
	root   string // the cgroup that is seen there; "/" is all
	// unified is that of version 2; one of version 1 is known by its options, among
	// which are its controllers or its name.
	unified bool
	options []string
}

// hierarchies finds those of the host, each once: those of version 1, one for each
// controller or more, and the unified one.
func hierarchies() ([]hierarchy, error) {
	raw, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	found := parseMounts(string(raw))
	if len(found) == 0 {
		return nil, fmt.Errorf("find cgroups: no cgroup file system is mounted")
	}
	return found, nil
}

// roots are where the hierarchies are mounted.
func roots() ([]string, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	points := make([]string, len(all))
	for i, h := range all {
		points[i] = h.point
	}
	return points, nil
}

// parseMounts reads /proc/PID/mountinfo: id, parent, device, root, mount point,
// options, optional fields, "-", type, source, options. Of several mounts of one
// hierarchy the first counts that shows it from its root.
func parseMounts(mountinfo string) []hierarchy {
	var all []hierarchy
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+4 || fields[dash+1] != "cgroup" && fields[dash+1] != "cgroup2" {
			continue
		}
		h := hierarchy{
			device: fields[2], root: unescape.Replace(fields[3]), point: unescape.Replace(fields[4]),
			unified: fields[dash+1] == "cgroup2", options: strings.Split(fields[dash+3], ","),
		}
		i := slices.IndexFunc(all, func(o hierarchy) bool { return o.device == h.device })
		switch {
		case i < 0:
			all = append(all, h)
		case all[i].root != "/" && h.root == "/":
			all[i] = h
		}
	}
	return all
}

// Of returns the cgroup that a process is in, which can be another in every
// hierarchy.
func Of(pid int) (*Cgroup, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	c := &Cgroup{}
	for _, h := range all {
		dir, err := h.find(string(raw))
		if err != nil {
			return nil, fmt.Errorf("find the cgroup of process %d: %w", pid, err)
		}
		c.dirs = append(c.dirs, dir)
	}
	return c, nil
}

// find returns the directory of the cgroup in /proc/PID/cgroup: a line is an id, the
// controllers, which are none in version 2, and the path.
func (h hierarchy) find(cgroups string) (string, error) {
	for line := range strings.Lines(cgroups) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) < 3 {
			continue
		}
		controllers := strings.Split(parts[1], ",")
		if h.unified != (parts[0] == "0" && parts[1] == "") || !h.unified && !slices.Contains(h.options, controllers[0]) {
			continue
		}
		below, err := filepath.Rel(h.root, parts[2])
		if err != nil || below == ".." || strings.HasPrefix(below, "../") {
			return "", fmt.Errorf("%s is not below %s, which is what %s shows", parts[2], h.root, h.point)
		}
		return filepath.Join(h.point, below), nil
	}
	return "", fmt.Errorf("the process is in none of %s", h.point)
}

// unescape undoes what the kernel does to mount points.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
