// Package hotplug takes CPUs of the guest into and out of use, and waits for memory that
// was plugged.
package hotplug

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/husk-containers/husk/agent/cgroup"
)

const (
	// margin is how long before the end of the caller's patience it is told what there
	// is, so that it hears it.
	margin = 500 * time.Millisecond
	// recheck is for memory that the kernel tells nothing of: virtio-mem fills up a
	// block that it has told of already.
	recheck = 200 * time.Millisecond
)

// A Machine is the CPUs and the memory of a guest, as its kernel shows them.
type Machine struct {
	// CPUs is /sys/devices/system/cpu.
	CPUs string
	// Meminfo is /proc/meminfo.
	Meminfo string
	// Containers is the cgroup of all containers.
	Containers cgroup.Dir
}

// Online takes CPUs into use, the lowest first, or out of use, the highest first, until
// so many are, and waits until the guest has so many bytes of memory; 0 asks for
// nothing. It waits for CPUs and memory that are yet to appear, and shortly before ctx
// ends tells what is in use.
func (m Machine) Online(ctx context.Context, cpus int, memory uint64) (int, uint64, error) {
	events, err := openUevents() // before the first look
	if err != nil {
		return 0, 0, err
	}
	defer events.Close()
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-margin))
		defer cancel()
	}
	for {
		used, err := m.setCPUs(cpus)
		if err != nil {
			return 0, 0, err
		}
		total, err := m.Memory()
		if err != nil {
			return 0, 0, err
		}
		if (cpus == 0 || used == cpus) && total >= memory {
			return used, total, nil
		}
		if err := events.next(ctx, time.Now().Add(recheck)); ctx.Err() != nil {
			return used, total, nil
		} else if err != nil {
			return 0, 0, err
		}
	}
}

// setCPUs takes as many CPUs as there are, and n at most, into use and the others out of
// it, and returns how many are in use. Where the kernel does not let one it stays as
// it is.
func (m Machine) setCPUs(n int) (int, error) {
	present, err := m.list("present")
	if err != nil {
		return 0, err
	}
	online, err := m.list("online")
	if err != nil || n == 0 {
		return len(online), err
	}
	before := len(online)
	first := present[:min(n, len(present))]
	for _, cpu := range first {
		if !slices.Contains(online, cpu) {
			m.set(cpu, "1")
		}
	}
	for _, cpu := range slices.Backward(present[len(first):]) {
		if slices.Contains(online, cpu) {
			m.set(cpu, "0")
		}
	}
	if online, err = m.list("online"); err == nil && len(online) != before {
		err = m.Containers.SettleCPUs()
	}
	return len(online), err
}

func (m Machine) set(cpu int, online string) {
	file := filepath.Join(m.CPUs, fmt.Sprint("cpu", cpu), "online")
	err := os.WriteFile(file, []byte(online), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // the first CPU has none
		slog.Warn("switch CPU", "cpu", cpu, "online", online, "err", err)
	}
}

// list reads a list of CPUs, which is ascending.
func (m Machine) list(name string) ([]int, error) {
	content, err := os.ReadFile(filepath.Join(m.CPUs, name))
	if err != nil {
		return nil, fmt.Errorf("read CPUs: %w", err)
	}
	cpus, err := cgroup.ParseSet(string(content))
	if err != nil {
		return nil, fmt.Errorf("read CPUs: %w", err)
	}
	return cpus, nil
}

// Memory returns MemTotal, in bytes.
func (m Machine) Memory() (uint64, error) { return m.meminfo("MemTotal") }

// Available returns MemAvailable, in bytes: what could be had without anybody's loss.
func (m Machine) Available() (uint64, error) { return m.meminfo("MemAvailable") }

func (m Machine) meminfo(name string) (uint64, error) {
	content, err := os.ReadFile(m.Meminfo)
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	for line := range strings.Lines(string(content)) { // MemTotal:   1000 kB
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" {
			kib, err := strconv.ParseUint(f[1], 10, 54)
			if err != nil {
				return 0, fmt.Errorf("read memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("read memory: /proc/meminfo has no %s", name)
}
