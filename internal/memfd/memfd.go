// Package memfd holds the memory of other processes, so that they can end before it is
// freed.
package memfd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Keep returns the files of a process that are memory, opened, so that the process
// does not have to free what it holds before it is gone: for each GiB that takes a busy
// host a second. Where they cannot be had it does.
func Keep(pid int) []*os.File {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var files []*os.File
	seen := map[uint64]bool{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if to, err := os.Readlink(path); err != nil || !strings.HasPrefix(to, "/memfd:") || unix.Stat(path, &st) != nil || seen[st.Ino] {
			continue
		}
		if f, err := os.Open(path); err == nil {
			seen[st.Ino] = true
			files = append(files, f)
		}
	}
	return files
}

// Free gives the memory back to the host. It does not wait: the kernel does it, also where
// this program ends before.
func Free(files []*os.File) {
	go func() {
		for _, f := range files {
			f.Close() //nolint:errcheck // nothing was written
		}
	}()
}
