package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// pools are the kernel's pools of huge pages, by the size of their pages.
type pools interface {
	// Get returns how many pages a pool has.
	Get(pageBytes uint64) (uint64, error)
	// Set has a pool have so many, or as many as there is memory for.
	Set(pageBytes, pages uint64) error
}

// addPages enlarges the kernel's pool of huge pages of that size so that it has room
// for so many bytes more, and returns by how many pages. They are for whoever asks
// for such pages, the file system or not: the cgroups' limits share them out.
func addPages(p pools, pageBytes, bytes uint64) (pages uint64, err error) {
	have, err := p.Get(pageBytes)
	if err != nil || bytes == 0 {
		return 0, err
	}
	pages = (bytes + pageBytes - 1) / pageBytes
	got := have
	err = p.Set(pageBytes, have+pages)
	if err == nil {
		got, err = p.Get(pageBytes)
	}
	if err == nil && got < have+pages {
		err = fmt.Errorf("the guest's memory has room for %d of %d huge pages of %d kB: give the VM more memory (hypervisor.default_memory_mib), or ask for fewer: %w",
			max(got, have)-have, pages, pageBytes>>10, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return 0, errors.Join(err, p.Set(pageBytes, have))
	}
	return pages, nil
}

// removePages makes the pool smaller again. Pages in use go when they are freed.
func removePages(p pools, pageBytes, pages uint64) error {
	have, err := p.Get(pageBytes)
	if err != nil {
		return err
	}
	return p.Set(pageBytes, have-min(have, pages))
}

// sysfs is the directory that the kernel shows its pools in.
type sysfs string

func (s sysfs) file(pageBytes uint64) string {
	return filepath.Join(string(s), fmt.Sprintf("hugepages-%dkB", pageBytes>>10), "nr_hugepages")
}

// Get implements pools.
func (s sysfs) Get(pageBytes uint64) (uint64, error) {
	data, err := os.ReadFile(s.file(pageBytes))
	if errors.Is(err, fs.ErrNotExist) {
		var sizes []string
		dirs, _ := filepath.Glob(string(s) + "/hugepages-*") //nolint:errcheck // the pattern is well-formed
		for _, dir := range dirs {
			sizes = append(sizes, strings.TrimPrefix(filepath.Base(dir), "hugepages-"))
		}
		return 0, fmt.Errorf("the guest has no huge pages of %d kB, but of %q: %w", pageBytes>>10, sizes, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// Set implements pools.
func (s sysfs) Set(pageBytes, pages uint64) error {
	return os.WriteFile(s.file(pageBytes), []byte(strconv.FormatUint(pages, 10)), 0)
}
