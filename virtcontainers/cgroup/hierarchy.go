package cgroup

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// roots finds where the host's hierarchies of cgroups are mounted, each once:
// those of version 1, one for each controller or more, and the unified one.
func roots() ([]string, error) {
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

// parseMounts reads /proc/PID/mountinfo: id, parent, device, root, mount point,
// options, optional fields, "-", type, source, options. Of several mounts of one
// hierarchy the first counts that shows it from its root.
func parseMounts(mountinfo string) []string {
	type hierarchy struct{ device, point, root string }
	var all []hierarchy
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+2 || fields[dash+1] != "cgroup" && fields[dash+1] != "cgroup2" {
			continue
		}
		h := hierarchy{device: fields[2], root: fields[3], point: unescape.Replace(fields[4])}
		i := slices.IndexFunc(all, func(o hierarchy) bool { return o.device == h.device })
		switch {
		case i < 0:
			all = append(all, h)
		case all[i].root != "/" && h.root == "/":
			all[i] = h
		}
	}
	points := make([]string, len(all))
	for i, h := range all {
		points[i] = h.point
	}
	return points
}

// unescape undoes what the kernel does to mount points.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
