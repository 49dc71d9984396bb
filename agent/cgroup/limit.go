package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// reclaimTimeout bounds the wait for the cache of files to make way.
const reclaimTimeout = 5 * time.Second

// Limit sets what the processes of the cgroup may use: all that r says but its
// devices, or, on error, nothing. InvalidArgument names a field that this kernel has
// no limit for, or a value that it does not take. FailedPrecondition where more
// memory is in use than the limit is to be, and cannot be reclaimed.
func (c Dir) Limit(r *specs.LinuxResources) error {
	writes, err := newPlan(r, c.text)
	if err != nil {
		return err
	}
	writes = slices.DeleteFunc(writes, func(w write) bool { return w.optional && !c.has(w.file) })
	for _, w := range writes {
		if err := c.check(w); err != nil {
			return err
		}
	}
	for i, w := range writes {
		old := c.text(w.file)
		if err := c.write(w.file, w.value+"\n"); err != nil {
			err = fmt.Errorf("resources: %s: %q for %s: %w", w.field, w.value, w.file, classify(err))
			return errors.Join(err, c.undo(writes[:i]))
		}
		writes[i].value = restore(w.value, old)
	}
	return nil
}

// undo undoes writes, whose values are what was there before.
func (c Dir) undo(writes []write) error {
	var errs []error
	for _, w := range slices.Backward(writes) {
		if err := c.write(w.file, w.value+"\n"); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", w.field, err))
		}
	}
	return errors.Join(errs...)
}

// restore is what to write where value was written over old. A file may have a line
// for each device, of which one that has no limit has none.
func restore(value, old string) string {
	key, settings, keyed := strings.Cut(value, " ")
	if !keyed || !strings.Contains(key, ":") && key != "default" {
		return old
	}
	for line := range strings.Lines(old) {
		if k, _, _ := strings.Cut(line, " "); k == key {
			return strings.TrimSpace(line)
		}
	}
	if !strings.Contains(settings, "=") {
		return key + " default"
	}
	for field := range strings.FieldsSeq(settings) {
		name, _, _ := strings.Cut(field, "=")
		key += " " + name + "=max"
	}
	return key
}

// classify gives an error of the kernel its class.
func classify(err error) error {
	var class error = errdefs.ErrUnknown
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		class = errdefs.ErrInvalidArgument
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOSPC):
		class = errdefs.ErrFailedPrecondition
	}
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("the guest's kernel does not take it: %w", class)
	}
	return fmt.Errorf("%w: %w", err, class)
}

// text is the content of a control file; empty where it cannot be read.
func (c Dir) text(file string) string {
	b, _ := os.ReadFile(c.file(file)) //nolint:errcheck // what cannot be read is refused by check
	return strings.TrimSpace(string(b))
}

func (c Dir) has(file string) bool {
	_, err := os.Stat(c.file(file))
	return err == nil
}

// check refuses what would be refused by the kernel too late, or not at all.
func (c Dir) check(w write) error {
	f, err := os.OpenFile(c.file(w.file), os.O_RDWR, 0)
	if err != nil {
		if _, gone := os.Stat(string(c)); errors.Is(gone, fs.ErrNotExist) {
			return fmt.Errorf("resources: the container has no cgroup: %w", errdefs.ErrNotFound)
		}
		return invalid("resources: %s: the guest's kernel has no %s", w.field, w.file)
	}
	f.Close()
	switch w.file {
	case "cpuset.cpus", "cpuset.mems":
		return c.checkSet(w)
	case "memory.max":
		return c.checkMemory(w)
	}
	return nil
}

// checkSet refuses CPUs and nodes that the guest has not: the kernel would take them,
// and use others.
func (c Dir) checkSet(w write) error {
	want, err := ParseSet(w.value)
	if err != nil {
		return invalid("resources: %s: %v", w.field, err)
	}
	there := Dir(filepath.Dir(string(c))).text(w.file + ".effective")
	have, err := ParseSet(there)
	if err != nil {
		return fmt.Errorf("resources: %s.effective: %w", w.file, err)
	}
	for _, n := range want {
		if !slices.Contains(have, n) {
			return invalid("resources: %s is %q, and the guest has %q", w.field, w.value, there)
		}
	}
	return nil
}

// ParseSet returns the numbers of a list such as 0-3,7, ascending. None is above 4095.
func ParseSet(list string) ([]int, error) {
	var set []int
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		from, err1 := strconv.ParseUint(first, 10, 12)
		to, err2 := strconv.ParseUint(last, 10, 12)
		if err1 != nil || err2 != nil || from > to {
			return nil, fmt.Errorf("%q is no list of numbers, such as 0-3,7", list)
		}
		for n := int(from); n <= int(to); n++ {
			set = append(set, n)
		}
	}
	slices.Sort(set)
	return slices.Compact(set), nil
}

// SettleCPUs returns when the cgroup's CPUs are those that are in use now: the kernel
// sees to that later, but before it takes a new list, even an empty one.
func (c Dir) SettleCPUs() error {
	if err := c.write("cpuset.cpus", "\n"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("settle CPUs of containers: %w", err)
	}
	return nil
}

// FitMemory sets the limit of memory, or what is in use where that is more and cannot be
// reclaimed: nothing is killed.
func (c Dir) FitMemory(limit uint64) error {
	return c.write("memory.max", strconv.FormatUint(max(limit, c.reclaim(limit)), 10))
}

// reclaim has the cache of files make way for the limit, and returns what is in use then.
// Where the cache is too small nothing is tried: of pages that have nowhere to go Linux 6.1
// tries for minutes.
func (c Dir) reclaim(limit uint64) uint64 {
	used := c.used()
	if stat := []byte(c.text("memory.stat")); used <= limit || used-limit > value(stat, "inactive_file")+value(stat, "active_file") {
		return used
	}
	done := make(chan struct{})
	go func() { // it ends when the kernel gives up
		defer close(done)
		c.write("memory.reclaim", strconv.FormatUint(used-limit, 10)) //nolint:errcheck // what it has come to is read
	}()
	select {
	case <-done:
	case <-time.After(reclaimTimeout):
	}
	return c.used()
}

func (c Dir) used() uint64 { return number([]byte(c.text("memory.current"))) }

// checkMemory refuses a limit below what is in use: the kernel would take it, and kill.
func (c Dir) checkMemory(w write) error {
	limit, err := parseBytes(w.value)
	if err != nil {
		return invalid("resources: %s: %v", w.field, err)
	}
	if used := c.reclaim(limit); used > limit {
		return fmt.Errorf("resources: %s is to be %d bytes, and the container uses %d, which cannot be reclaimed: "+
			"processes of it would be killed: have it use less, or set a higher limit: %w", w.field, limit, used, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// parseBytes is a number of bytes as the kernel reads one.
func parseBytes(s string) (uint64, error) {
	if s == "max" {
		return math.MaxUint64, nil
	}
	digits := strings.TrimRight(s, "KMGTkmgt")
	shift := map[string]int{"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
	by, ok := shift[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseUint(digits, 10, 64)
	if !ok || err != nil || n > math.MaxUint64>>by {
		return 0, fmt.Errorf("%q is no number of bytes", s)
	}
	return n << by, nil
}
