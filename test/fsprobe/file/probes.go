// Package file probes names, contents, and what processes do with one file together.
package file

import "github.com/husk-containers/husk/test/fsprobe/try"

// Probes are this package's, in the order in which they run.
func Probes() []try.Probe {
	return []try.Probe{
		{Name: "names", Run: names},
		{Name: "symlink", Run: symlink},
		{Name: "hardlink", Run: hardLink},
		{Name: "rename", Run: rename},
		{Name: "rename-flags", Run: renameFlags},
		{Name: "deep", Run: deep},
		{Name: "directory", Run: directory},
		{Name: "open", Run: open},
		{Name: "unlinked", Run: unlinked},
		{Name: "tmpfile", Run: tmpfile},
		{Name: "truncate", Run: truncate},
		{Name: "sparse", Run: sparse},
		{Name: "fallocate", Run: fallocate},
		{Name: "copy", Run: copyRange},
		{Name: "append", Run: appending},
		{Name: "direct", Run: direct},
		{Name: "sync", Run: syncing},
		{Name: "mmap", Run: mmap},
		{Name: "flock", Run: flock},
		{Name: "posix-lock", Run: posixLock},
		{Name: "ofd-lock", Run: ofdLock},
		{Name: "lease", Run: lease},
		{Name: "fifo", Run: fifo},
		{Name: "socket", Run: socket},
	}
}
