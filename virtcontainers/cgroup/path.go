package cgroup

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Parse returns the path, absolute and clean, of the cgroup that a spec's
// linux.cgroupsPath names. There are two forms: a path, which is cgroupfs's, and
// slice:prefix:name, which is systemd's and becomes the directories that systemd has
// for it. Root is no container's cgroup.
func Parse(cgroupsPath string) (string, error) {
	p := cgroupsPath
	if parts := strings.Split(p, ":"); len(parts) == 3 && !strings.Contains(p, "/") {
		slice, err := expandSlice(parts[0])
		if err != nil {
			return "", fmt.Errorf("cgroup %q: %w", cgroupsPath, err)
		}
		p = slice + "/" + unit(parts[1], parts[2])
	}
	clean := path.Clean("/" + p)
	for element := range strings.SplitSeq(p, "/") {
		if element == ".." || strings.ContainsRune(element, 0) {
			return "", fmt.Errorf("cgroup %q: no path of a cgroup: %w", cgroupsPath, errdefs.ErrInvalidArgument)
		}
	}
	if clean == "/" {
		return "", fmt.Errorf("cgroup %q: the root is no container's: %w", cgroupsPath, errdefs.ErrInvalidArgument)
	}
	return clean, nil
}

// OfPod returns what a spec's linux.cgroupsPath would be of a pod's sandbox container,
// for a pod that has none: CRI names what the pod is in. It is the name that
// containerd gives; empty where CRI names nothing.
func OfPod(parent, id string) string {
	base := path.Base(parent)
	switch {
	case parent == "":
		return ""
	case strings.HasSuffix(base, ".slice"):
		return base + ":cri-containerd:" + id
	}
	return path.Join(parent, id)
}

// expandSlice returns the path of a slice: that of a-b.slice is
// /a.slice/a-b.slice, and of the root slice, -.slice, the root. Empty is
// system.slice.
func expandSlice(slice string) (string, error) {
	switch slice {
	case "":
		return "/system.slice", nil
	case "-.slice":
		return "", nil
	}
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "" {
		return "", fmt.Errorf("%q is no slice: %w", slice, errdefs.ErrInvalidArgument)
	}
	var dir, prefix string
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("slice %q has an empty part: %w", slice, errdefs.ErrInvalidArgument)
		}
		prefix += part
		dir += "/" + prefix + ".slice"
		prefix += "-"
	}
	return dir, nil
}

// unit is the name of a container's unit: a scope, but where it is called a slice.
func unit(prefix, name string) string {
	switch {
	case strings.HasSuffix(name, ".slice"):
		return name
	case prefix == "":
		return name + ".scope"
	}
	return prefix + "-" + name + ".scope"
}
