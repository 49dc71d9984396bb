package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// Processes lists those of the pod: its shim, and all that is below it.
func (p *Pod) Processes() ([]daemon.Process, error) {
	all, err := p.Node.Daemon.Processes()
	if err != nil {
		return nil, err
	}
	for _, tree := range daemon.Trees(all) {
		if slices.Contains(tree[0].Args, p.ID) {
			return tree, nil
		}
	}
	return nil, fmt.Errorf("find the processes of %s: no shim has its id", p.Name)
}

// CPUGrain is what the kernel tells the CPU time of processes in: USER_HZ, the same on
// all architectures that containers run on.
const CPUGrain = time.Second / 100

// CPUTime is what the pod's processes, and those that they waited for, have used.
func (p *Pod) CPUTime() (time.Duration, error) {
	processes, err := p.Processes()
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, process := range processes {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", process.PID))
		if err != nil {
			return 0, err
		}
		// From the state on: utime, stime, cutime, cstime are the 12th to 15th.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		for _, field := range fields[11:15] {
			ticks, err := strconv.Atoi(field)
			if err != nil {
				return 0, fmt.Errorf("read the CPU time of %v: %w", process, err)
			}
			sum += time.Duration(ticks) * CPUGrain
		}
	}
	return sum, nil
}

// RAM is the memory that QEMU has made for a guest, in KiB.
type RAM struct {
	Size int
	Held int // of it the host has: what the guest has touched, and not given back
}

// RAM reads that of the pod's VM. It is for one goroutine.
func (p *Pod) RAM() (RAM, error) {
	if p.vmm == 0 { // to look for it takes longer than memory stays
		processes, err := p.Processes()
		if err != nil {
			return RAM{}, err
		}
		i := slices.IndexFunc(processes, func(p daemon.Process) bool { return strings.HasPrefix(p.Name, "qemu-system") })
		if i < 0 {
			return RAM{}, fmt.Errorf("find the memory of %s: it has no QEMU", p.Name)
		}
		p.vmm = processes[i].PID
	}
	return memoryFiles(p.vmm)
}

// memoryFiles adds up the files without a name that a process has open.
func memoryFiles(pid int) (RAM, error) {
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return RAM{}, err
	}
	var sum RAM
	seen := map[uint64]bool{}
	for _, entry := range entries {
		var stat unix.Stat_t
		if target, err := os.Readlink(dir + entry.Name()); err != nil || !strings.HasPrefix(target, "/memfd:") {
			continue // or it was closed since
		}
		if err := unix.Stat(dir+entry.Name(), &stat); err != nil || seen[stat.Ino] {
			continue
		}
		seen[stat.Ino] = true
		sum.Size += int(stat.Size >> 10)
		sum.Held += int(stat.Blocks / 2) // of 512 bytes
	}
	return sum, nil
}

// A Charge is what the host's cgroups count to a pod, in KiB.
type Charge struct {
	Usage int
	Anon  int // anonymous and shared memory, a guest's RAM with it
	Files int // the cache of files: it is let go of where memory is wanted
}

// Kernel is the rest: the kernel's own memory, page tables for one, and what it has
// counted ahead.
func (c Charge) Kernel() int { return c.Usage - c.Anon - c.Files }

const cgroupRoot = "/sys/fs/cgroup"

// cgroups lists those that limit the pod's memory, of either version. A pod of Husk
// has one, named for it; of runc's each container has one too.
func (p *Pod) cgroups() ([]string, error) {
	var list []string
	for _, id := range append([]string{p.ID}, p.Containers...) {
		for _, root := range []string{filepath.Join(cgroupRoot, "memory"), cgroupRoot} {
			dir := filepath.Join(root, p.Node.Daemon.Token, id)
			if _, err := os.Stat(dir); err == nil {
				list = append(list, dir)
				break
			} else if !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	}
	return list, nil
}

// Charge reads the pod's. It is zero for one without a cgroup.
func (p *Pod) Charge() (Charge, error) {
	dirs, err := p.cgroups()
	if err != nil {
		return Charge{}, err
	}
	var sum Charge
	for _, dir := range dirs {
		usage, stat := filepath.Join(dir, "memory.usage_in_bytes"), filepath.Join(dir, "memory.stat")
		anon, cache, shared := "total_rss", "total_cache", "total_shmem"
		data, err := os.ReadFile(usage)
		if errors.Is(err, fs.ErrNotExist) { // version 2
			data, err = os.ReadFile(filepath.Join(dir, "memory.current"))
			anon, cache, shared = "anon", "file", "shmem"
		}
		if err != nil {
			return Charge{}, err
		}
		bytes, err := strconv.Atoi(strings.TrimSpace(string(data)))
		if err != nil {
			return Charge{}, fmt.Errorf("read the memory of cgroup %s: %w", dir, err)
		}
		values := map[string]int{}
		for _, name := range []string{anon, cache, shared} {
			if values[name], err = number(stat, `(?m)^`+name+` (\d+)$`); err != nil {
				return Charge{}, err
			}
		}
		sum.Usage += bytes >> 10
		sum.Anon += (values[anon] + values[shared]) >> 10
		sum.Files += (values[cache] - values[shared]) >> 10 // which has the shared in it
	}
	return sum, nil
}

// Members returns of processes those that the pod's cgroups have, and their
// proportional anonymous and shared memory, in KiB.
func (p *Pod) Members(processes []daemon.Process) (in []daemon.Process, anon int, err error) {
	dirs, err := p.cgroups()
	if err != nil {
		return nil, 0, err
	}
	for _, process := range processes {
		for _, dir := range dirs {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				return nil, 0, err
			}
			if !slices.Contains(strings.Fields(string(procs)), strconv.Itoa(process.PID)) {
				continue
			}
			in = append(in, process)
			for _, kind := range []string{"Anon", "Shmem"} {
				kib, err := number(fmt.Sprintf("/proc/%d/smaps_rollup", process.PID), `(?m)^Pss_`+kind+`:\s+(\d+) kB$`)
				if err != nil {
					return nil, 0, err
				}
				anon += kib
			}
		}
	}
	return in, anon, nil
}

// number reads the one that pattern captures in a file.
func number(path, pattern string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	match := regexp.MustCompile(pattern).FindSubmatch(data)
	if match == nil {
		return 0, fmt.Errorf("read %s: nothing in it matches %s", path, pattern)
	}
	return strconv.Atoi(string(match[1]))
}
