package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	// maxDevices and maxPageSizes are the protocol's.
	maxDevices   = 256
	maxPageSizes = 16
	// maxFile is more than any of the files has that are read here, but for an io.stat
	// of very many devices.
	maxFile = 32 << 10
)

// A reader reads the files of one cgroup into one buffer. The first error ends it; a
// file that is not there, for the kernel has it not, is no error and is empty.
type reader struct {
	dir int
	buf []byte
	err error
}

// Stats reads what the cgroup uses. Nothing of it waits for a process. fs.ErrNotExist
// where there is no such cgroup.
func (c Dir) Stats() (*agentv1.StatsContainerResponse, error) {
	dir, err := unix.Open(string(c), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read statistics: %w", &fs.PathError{Op: "open", Path: string(c), Err: err})
	}
	defer unix.Close(dir)
	r := &reader{dir: dir, buf: make([]byte, maxFile)}
	s := &agentv1.StatsContainerResponse{
		Cpu:          r.cpu(),
		Memory:       r.memory(),
		MemoryEvents: r.memoryEvents(),
		Pids:         &agentv1.PidsStats{Current: r.number("pids.current"), Limit: r.number("pids.max")},
		Io:           &agentv1.IOStats{Devices: devices(r.read("io.stat")), Pressure: r.pressure("io.pressure")},
	}
	for _, size := range pageSizes() {
		stem := "hugetlb." + size
		h := &agentv1.HugetlbStats{
			PageSize: size,
			Current:  r.number(stem + ".current"),
			Max:      r.number(stem + ".max"),
			Failcnt:  value(r.read(stem+".events"), "max"),
		}
		s.Hugetlb = append(s.Hugetlb, h)
	}
	if r.err != nil {
		return nil, fmt.Errorf("read statistics: %w", r.err)
	}
	return s, nil
}

// pageSizes lists the sizes of huge pages as the kernel calls the files of cgroups.
func pageSizes() []string {
	entries, err := os.ReadDir("/sys/kernel/mm/hugepages") // hugepages-2048kB
	if err != nil {
		return nil
	}
	var sizes []string
	for _, e := range entries[:min(len(entries), maxPageSizes)] {
		name, ok := strings.CutPrefix(e.Name(), "hugepages-")
		kib, err := strconv.ParseUint(strings.TrimSuffix(name, "kB"), 10, 44)
		if ok && err == nil {
			sizes = append(sizes, PageSize(kib<<10))
		}
	}
	return sizes
}

// PageSize is how a cgroup's files call huge pages of so many bytes: "2MB", "1GB".
func PageSize(size uint64) string {
	switch {
	case size >= 1<<30:
		return fmt.Sprintf("%dGB", size>>30)
	case size >= 1<<20:
		return fmt.Sprintf("%dMB", size>>20)
	}
	return fmt.Sprintf("%dKB", size>>10)
}

// read returns the content of a file, which is valid until the next read.
func (r *reader) read(name string) []byte {
	if r.err != nil {
		return nil
	}
	fd, err := unix.Openat(r.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	n := 0
	for err == nil && n < len(r.buf) {
		var got int
		got, err = unix.Read(fd, r.buf[n:])
		if errors.Is(err, unix.EINTR) {
			err = nil
			continue
		}
		if got <= 0 {
			break
		}
		n += got
	}
	if fd >= 0 {
		unix.Close(fd)
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // pressure, where the kernel was told not to keep it
		return nil
	case errors.Is(err, unix.ENODEV): // the cgroup is gone meanwhile
		err = fs.ErrNotExist
	}
	if err != nil {
		r.err = &fs.PathError{Op: "read", Path: name, Err: err}
		return nil
	}
	return r.buf[:n]
}

// number reads a file that is one number, or "max".
func (r *reader) number(name string) uint64 {
	return number(bytes.TrimSuffix(r.read(name), []byte("\n")))
}

// number is 0 for what is none.
func number(b []byte) uint64 {
	if string(b) == "max" {
		return math.MaxUint64
	}
	n, err := strconv.ParseUint(string(b), 10, 64) // the string does not escape: no allocation
	if err != nil {
		return 0
	}
	return n
}

// fields stores the values of "key value" lines.
func fields(content []byte, into map[string]*uint64) {
	for line := range bytes.Lines(content) {
		key, rest, _ := bytes.Cut(line, []byte(" "))
		if p := into[string(key)]; p != nil {
			*p = number(bytes.TrimSuffix(rest, []byte("\n")))
		}
	}
}

// value is that of one key of "key value" lines.
func value(content []byte, key string) (n uint64) {
	fields(content, map[string]*uint64{key: &n})
	return n
}

func (r *reader) cpu() *agentv1.CPUStats {
	s := &agentv1.CPUStats{}
	fields(r.read("cpu.stat"), map[string]*uint64{
		"usage_usec": &s.UsageUsec, "user_usec": &s.UserUsec, "system_usec": &s.SystemUsec,
		"nr_periods": &s.NrPeriods, "nr_throttled": &s.NrThrottled, "throttled_usec": &s.ThrottledUsec,
		"nr_bursts": &s.NrBursts, "burst_usec": &s.BurstUsec,
	})
	s.Pressure = r.pressure("cpu.pressure")
	return s
}

func (r *reader) memory() *agentv1.MemoryStats {
	s := &agentv1.MemoryStats{}
	// Since Linux 5.9 refaults and activations are told of anonymous and of file pages.
	var refault, activate uint64
	fields(r.read("memory.stat"), map[string]*uint64{
		"anon": &s.Anon, "file": &s.File, "kernel_stack": &s.KernelStack, "slab": &s.Slab, "sock": &s.Sock,
		"shmem": &s.Shmem, "file_mapped": &s.FileMapped, "file_dirty": &s.FileDirty, "file_writeback": &s.FileWriteback,
		"anon_thp": &s.AnonThp, "inactive_anon": &s.InactiveAnon, "active_anon": &s.ActiveAnon,
		"inactive_file": &s.InactiveFile, "active_file": &s.ActiveFile, "unevictable": &s.Unevictable,
		"slab_reclaimable": &s.SlabReclaimable, "slab_unreclaimable": &s.SlabUnreclaimable,
		"pgfault": &s.Pgfault, "pgmajfault": &s.Pgmajfault, "workingset_nodereclaim": &s.WorkingsetNodereclaim,
		"pgrefill": &s.Pgrefill, "pgscan": &s.Pgscan, "pgsteal": &s.Pgsteal, "pgactivate": &s.Pgactivate,
		"pgdeactivate": &s.Pgdeactivate, "pglazyfree": &s.Pglazyfree, "pglazyfreed": &s.Pglazyfreed,
		"workingset_refault_anon": &refault, "workingset_refault_file": &s.WorkingsetRefault,
		"workingset_activate_anon": &activate, "workingset_activate_file": &s.WorkingsetActivate,
		"thp_fault_alloc": &s.ThpFaultAlloc, "thp_collapse_alloc": &s.ThpCollapseAlloc,
	})
	s.WorkingsetRefault += refault
	s.WorkingsetActivate += activate
	s.Usage, s.UsageLimit, s.MaxUsage = r.number("memory.current"), r.number("memory.max"), r.number("memory.peak")
	s.SwapUsage, s.SwapLimit, s.SwapMaxUsage = r.number("memory.swap.current"), r.number("memory.swap.max"), r.number("memory.swap.peak")
	s.Pressure = r.pressure("memory.pressure")
	return s
}

func (r *reader) memoryEvents() *agentv1.MemoryEvents {
	s := &agentv1.MemoryEvents{}
	fields(r.read("memory.events"), map[string]*uint64{
		"low": &s.Low, "high": &s.High, "max": &s.Max, "oom": &s.Oom, "oom_kill": &s.OomKill, "oom_group_kill": &s.OomGroupKill,
	})
	return s
}

// pressure reads a file of pressure stall information; nil where there is none.
func (r *reader) pressure(name string) *agentv1.Pressure { return pressure(r.read(name)) }

func pressure(content []byte) *agentv1.Pressure {
	var s *agentv1.Pressure
	for line := range bytes.Lines(content) { // some avg10=0.00 avg60=0.00 avg300=0.00 total=0
		kind, rest, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		l := &agentv1.PressureLine{}
		for field := range bytes.FieldsSeq(rest) {
			key, v, _ := bytes.Cut(field, []byte("="))
			switch string(key) {
			case "avg10":
				l.Avg10 = percent(v)
			case "avg60":
				l.Avg60 = percent(v)
			case "avg300":
				l.Avg300 = percent(v)
			case "total":
				l.Total = number(v)
			}
		}
		if s == nil {
			s = &agentv1.Pressure{}
		}
		switch string(kind) {
		case "some":
			s.Some = l
		case "full":
			s.Full = l
		}
	}
	return s
}

func percent(b []byte) float64 {
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0
	}
	return f
}

// devices parses io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0".
func devices(content []byte) []*agentv1.DeviceIO {
	var all []*agentv1.DeviceIO
	for line := range bytes.Lines(content) {
		device, rest, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		major, minor, ok := bytes.Cut(device, []byte(":"))
		ma, err1 := strconv.ParseUint(string(major), 10, 12)
		mi, err2 := strconv.ParseUint(string(minor), 10, 20)
		if !ok || err1 != nil || err2 != nil || len(all) == maxDevices {
			continue
		}
		d := &agentv1.DeviceIO{Major: uint32(ma), Minor: uint32(mi)}
		for field := range bytes.FieldsSeq(rest) {
			key, v, _ := bytes.Cut(field, []byte("="))
			switch string(key) {
			case "rbytes":
				d.Rbytes = number(v)
			case "wbytes":
				d.Wbytes = number(v)
			case "rios":
				d.Rios = number(v)
			case "wios":
				d.Wios = number(v)
			}
		}
		all = append(all, d)
	}
	return all
}
