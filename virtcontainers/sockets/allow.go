package sockets

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Allowed tells whether a host path fits one of the patterns of
// runtime.allowed_sockets: in those ** stands for any number of elements of a path,
// and within an element *, ? and [...] mean what they do in a shell.
func Allowed(patterns []string, hostPath string) bool {
	for _, p := range patterns {
		if fits(elements(p), elements(hostPath)) {
			return true
		}
	}
	return false
}

func elements(p string) []string {
	p = strings.Trim(path.Clean(p), "/")
	if p == "" {
		return nil
	}
	return strings.Split(p, "/")
}

func fits(pattern, name []string) bool {
	for i, p := range pattern {
		if p == "**" {
			for skipped := 0; skipped <= len(name)-i; skipped++ {
				if fits(pattern[i+1:], name[i+skipped:]) {
					return true
				}
			}
			return false
		}
		if i == len(name) {
			return false
		}
		if ok, err := path.Match(p, name[i]); err != nil || !ok { // the configuration holds no bad pattern
			return false
		}
	}
	return len(pattern) == len(name)
}

// check refuses a socket that the configuration does not allow. resolved is where
// its path leads: that is what counts.
func check(patterns []string, hostPath, resolved string) error {
	if Allowed(patterns, resolved) {
		return nil
	}
	leads := ""
	if resolved != hostPath {
		leads = fmt.Sprintf(", which is %s,", resolved)
	}
	return fmt.Errorf("host socket %s%s is not among runtime.allowed_sockets of Husk's configuration: %w", hostPath, leads, errdefs.ErrPermissionDenied)
}
