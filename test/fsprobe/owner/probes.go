// Package owner probes whose files are, who may do what with them, and what is
// known of them.
package owner

import "github.com/husk-containers/husk/test/fsprobe/try"

// Probes are this package's, in the order in which they run.
func Probes() []try.Probe {
	return []try.Probe{
		{Name: "owner", Run: owner},
		{Name: "chown", Run: chown},
		{Name: "setid", Run: setID},
		{Name: "setgid-directory", Run: setgidDirectory},
		{Name: "access", Run: access},
		{Name: "sticky", Run: sticky},
		{Name: "execute", Run: execute},
		{Name: "xattr", Run: xattr},
		{Name: "capability", Run: capability},
		{Name: "privileged-xattr", Run: privilegedXattr},
		{Name: "acl", Run: acl},
		{Name: "times", Run: times},
		{Name: "statfs", Run: statfs},
		{Name: "inotify", Run: inotify},
		{Name: "mknod", Run: mknod},
	}
}
