package placement

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// ReadHost reads what CPUs and nodes there are from sysfs below root, which is "/" but
// for tests. A kernel without memory nodes has one, 0.
func ReadHost(root string) (Host, error) {
	system := filepath.Join(root, "sys/devices/system")
	read := func(name string) ([]int, error) {
		raw, err := os.ReadFile(filepath.Join(system, name))
		if err != nil {
			return nil, fmt.Errorf("read the host's CPUs: %w", err)
		}
		list, err := ParseList(string(raw))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		return list, nil
	}
	cpus, err := read("cpu/online")
	if err != nil {
		return Host{}, err
	}
	h := Host{CPUs: cpus, Nodes: map[int][]int{}}
	online, err := read("node/online")
	if errors.Is(err, fs.ErrNotExist) {
		h.Nodes[0] = cpus
		return h, nil
	}
	if err != nil {
		return Host{}, err
	}
	for _, node := range online {
		if h.Nodes[node], err = read("node/node" + strconv.Itoa(node) + "/cpulist"); err != nil {
			return Host{}, err
		}
	}
	return h, nil
}

// Apply binds threads of the host: those of the vCPUs, by number, and all others of the
// processes, which the VM's own is one of. A thread or a process that has ended is
// passed over. Threads of the kernel's that work for a VM are not bound.
func (p Plan) Apply(vcpus map[int]int, processes []int) error {
	var errs []error
	of := map[int]bool{}
	for number, tid := range vcpus {
		of[tid] = true
		if number < 0 || number >= len(p.VCPUs) {
			errs = append(errs, fmt.Errorf("bind vCPU %d: the plan has %d", number, len(p.VCPUs)))
			continue
		}
		if err := bind(tid, p.VCPUs[number]); err != nil {
			errs = append(errs, fmt.Errorf("bind vCPU %d: %w", number, err))
		}
	}
	for _, pid := range processes {
		// A thread that appears meanwhile has the affinity of the one that made it: once
		// no new one is found, there is none of the old affinity.
		for more := true; more; {
			more = false
			tids, err := threads(pid)
			if err != nil {
				errs = append(errs, err)
			}
			for _, tid := range tids {
				if of[tid] {
					continue
				}
				of[tid], more = true, true
				if err := bind(tid, p.Helpers); err != nil {
					errs = append(errs, fmt.Errorf("bind process %d: %w", pid, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func threads(pid int) ([]int, error) {
	entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the threads of process %d: %w", pid, err)
	}
	var tids []int
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// bind binds a thread to CPUs; nil: to all that its cgroup lets it have.
func bind(tid int, cpus []int) error {
	var set unix.CPUSet
	if cpus == nil {
		set.Fill()
	} else {
		const size = len(set) * 64
		if i := slices.IndexFunc(cpus, func(cpu int) bool { return cpu >= size }); i >= 0 {
			return fmt.Errorf("CPU %d: only the first %d can be bound to", cpus[i], size)
		}
		for _, cpu := range cpus {
			set.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("bind thread %d to CPUs %s: %w", tid, FormatList(cpus), err)
	}
	return nil
}
