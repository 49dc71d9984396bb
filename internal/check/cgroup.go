package check

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// controllers that bound a pod on the host.
var controllers = [...]string{"cpu", "memory", "pids"}

func hostCgroups() Result {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Result{Warn, "cgroups", err.Error() + "; mount /proc"}
	}
	return cgroups(string(mounts), func(dir string) string {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return "" // an unreadable hierarchy offers nothing
		}
		return string(b)
	})
}

// cgroups tells which controllers the mounts offer. unified returns the
// controllers of the version 2 hierarchy at a directory.
func cgroups(mountinfo string, unified func(dir string) string) Result {
	const name = "cgroups"
	var v1, v2 []string
	for line := range strings.Lines(mountinfo) {
		// ... mount point (field 5) ... - type source options: proc_pid_mountinfo(5)
		mount, fs, _ := strings.Cut(line, " - ")
		fields, fsFields := strings.Fields(mount), strings.Fields(fs)
		if len(fields) < 5 || len(fsFields) < 3 {
			continue
		}
		switch fsFields[0] {
		case "cgroup":
			v1 = append(v1, strings.Split(fsFields[2], ",")...)
		case "cgroup2":
			v2 = append(v2, strings.Fields(unified(fields[4]))...)
		}
	}
	var found, missing []string
	version := "v2"
	for _, c := range controllers {
		switch {
		case slices.Contains(v2, c):
			found = append(found, c)
		case slices.Contains(v1, c):
			version = "v1"
			found = append(found, c)
		default:
			missing = append(missing, c)
		}
	}
	have := version + " with " + strings.Join(found, ", ")
	switch {
	case len(found) == 0:
		return Result{Warn, name, "no controller: pods are not bounded on the host; mount the cgroup file systems"}
	case len(missing) > 0:
		return Result{Warn, name, have + ", but without " + strings.Join(missing, ", ") +
			": pods are not bounded by it on the host; switch it on in the kernel and mount it"}
	}
	return Result{OK, name, have}
}
