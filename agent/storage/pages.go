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
	"golang.org/x/sys/unix"
)

// A pool is how many huge pages of one size the kernel has.
type pool struct {
	pages      uint64 // that are kept, in use or not
	surplus    uint64 // beyond them, which go when they are freed
	overcommit uint64 // is the most surplus pages that there may be
}

// pools are the kernel's pools of huge pages, by the size of their pages.
type pools interface {
	Get(pageBytes uint64) (pool, error)
	// Set has a pool keep so many pages, or as many as there is memory for. Surplus
	// pages become kept ones first.
	Set(pageBytes, pages uint64) error
	// SetOvercommit has the kernel add so many surplus pages at most.
	SetOvercommit(pageBytes, pages uint64) error
	// Memory is that of the machine in bytes.
	Memory() (uint64, error)
}

// addPages enlarges the kernel's pool of huge pages of that size so that it has room
// for so many bytes more, and returns by how many pages. They are for whoever asks
// for such pages, the file system or not: the cgroups' limits share them out.
func addPages(p pools, pageBytes, bytes uint64) (pages uint64, err error) {
	had, err := p.Get(pageBytes)
	if err != nil {
		return 0, err
	}
	pages = (bytes + pageBytes - 1) / pageBytes
	have := had.pages + had.surplus // the latter are in use
	got := pool{pages: have}
	err = p.Set(pageBytes, have+pages)
	if err == nil {
		got, err = p.Get(pageBytes)
	}
	if err == nil && got.pages < have+pages {
		err = fmt.Errorf("the guest's memory has room for %d of %d huge pages of %d kB: give the VM more memory (hypervisor.default_memory_mib), or ask for fewer: %w",
			max(got.pages, have)-have, pages, pageBytes>>10, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return 0, errors.Join(err, p.Set(pageBytes, had.pages))
	}
	return have + pages - had.pages, nil
}

// removePages makes the pool smaller again. Pages in use go when they are freed.
func removePages(p pools, pageBytes, pages uint64) error {
	have, err := p.Get(pageBytes)
	if err != nil {
		return err
	}
	return p.Set(pageBytes, have.pages-min(have.pages, pages))
}

// demand is the volumes without a size whose pages are of one size.
type demand struct {
	volumes int
	before  uint64 // what the kernel's limit of surplus pages was without them
}

// addDemand has the kernel make huge pages of that size when they are asked for, for
// one volume more. As with a host's pool whoever finds none gets ENOMEM.
func (s *Set) addDemand(pageBytes uint64) error {
	if d := s.demands[pageBytes]; d != nil {
		d.volumes++
		return nil
	}
	have, err := s.pools.Get(pageBytes)
	if err != nil {
		return err
	}
	memory, err := s.pools.Memory()
	if err != nil {
		return err
	}
	most := (memory - memory/8) / pageBytes // the rest is for programs and the kernel
	err = s.pools.SetOvercommit(pageBytes, max(have.overcommit, most))
	// Pages that are too large for the kernel's allocator are in the pool or nowhere.
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	s.demands[pageBytes] = &demand{volumes: 1, before: have.overcommit}
	return nil
}

// removeDemand is for one volume less. Pages in use go when they are freed.
func (s *Set) removeDemand(pageBytes uint64) error {
	d := s.demands[pageBytes]
	if d.volumes == 1 {
		if err := s.pools.SetOvercommit(pageBytes, d.before); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		delete(s.demands, pageBytes)
	}
	d.volumes--
	return nil
}

// sysfs is the directory that the kernel shows its pools in.
type sysfs string

func (s sysfs) file(pageBytes uint64, name string) string {
	return filepath.Join(string(s), fmt.Sprintf("hugepages-%dkB", pageBytes>>10), name)
}

// Get implements pools.
func (s sysfs) Get(pageBytes uint64) (pool, error) {
	all, err := s.read(pageBytes, "nr_hugepages")
	if errors.Is(err, fs.ErrNotExist) {
		var sizes []string
		dirs, _ := filepath.Glob(string(s) + "/hugepages-*") //nolint:errcheck // the pattern is well-formed
		for _, dir := range dirs {
			sizes = append(sizes, strings.TrimPrefix(filepath.Base(dir), "hugepages-"))
		}
		return pool{}, fmt.Errorf("the guest has no huge pages of %d kB, but of %q: %w", pageBytes>>10, sizes, errdefs.ErrNotFound)
	}
	if err != nil {
		return pool{}, err
	}
	surplus, err := s.read(pageBytes, "surplus_hugepages")
	if err != nil {
		return pool{}, err
	}
	overcommit, err := s.read(pageBytes, "nr_overcommit_hugepages")
	// Between the two reads pages may have come.
	return pool{pages: all - min(all, surplus), surplus: surplus, overcommit: overcommit}, err
}

func (s sysfs) read(pageBytes uint64, name string) (uint64, error) {
	data, err := os.ReadFile(s.file(pageBytes, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// Set implements pools.
func (s sysfs) Set(pageBytes, pages uint64) error {
	return s.write(pageBytes, "nr_hugepages", pages)
}

// SetOvercommit implements pools.
func (s sysfs) SetOvercommit(pageBytes, pages uint64) error {
	return s.write(pageBytes, "nr_overcommit_hugepages", pages)
}

func (s sysfs) write(pageBytes uint64, name string, pages uint64) error {
	return os.WriteFile(s.file(pageBytes, name), []byte(strconv.FormatUint(pages, 10)), 0)
}

// Memory implements pools.
func (s sysfs) Memory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("ask how much memory there is: %w", err)
	}
	return info.Totalram * uint64(info.Unit), nil
}
