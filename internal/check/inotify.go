package check

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

const (
	// instancesPath is the sysctl that bounds the inotify instances of a user; each
	// pod has one, which follows its configMaps and the host's mounts.
	instancesPath = "/proc/sys/fs/inotify/max_user_instances"
	// fewInstances is below twice the pods that a node has by Kubernetes' default
	// (110); the kubelet and containerd need some too.
	fewInstances = 256
)

// inotify tells how many pods root can watch files for.
func inotify(path string) Result {
	const name = "inotify"
	raw, err := os.ReadFile(path)
	var most int
	if err == nil {
		most, err = strconv.Atoi(strings.TrimSpace(string(raw)))
	}
	switch {
	case err != nil:
		return Result{Warn, name, err.Error()}
	case most < fewInstances:
		return Result{Warn, name, fmt.Sprintf("fs.inotify.max_user_instances is %d, and each pod takes one: sysctl -w fs.inotify.max_user_instances=1024", most)}
	}
	return Result{OK, name, fmt.Sprintf("%d instances, one for each pod", most)}
}
