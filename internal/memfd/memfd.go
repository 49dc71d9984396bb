// Package memfd is the memory of other processes that is in files: how much it is, and how
// to hold it, so that they can end before it is freed.
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
	var files []*os.File
	each(pid, func(path string, _ unix.Stat_t) { //nolint:errcheck // see above
		if f, err := os.Open(path); err == nil {
			files = append(files, f)
		}
	})
	return files
}

// Held is what the host holds of a process's files that are memory, in bytes.
func Held(pid int) (int64, error) {
	var blocks int64
	err := each(pid, func(_ string, st unix.Stat_t) { blocks += st.Blocks })
	return blocks * 512, err
}

// each calls f for each of them, once.
func each(pid int, f func(path string, st unix.Stat_t)) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("find the memory of process %d: %w", pid, err)
	}
	seen := map[uint64]bool{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if to, err := os.Readlink(path); err != nil || !strings.HasPrefix(to, "/memfd:") || unix.Stat(path, &st) != nil || seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		f(path, st)
	}
	return nil
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
