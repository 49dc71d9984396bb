// Package hotplug takes CPUs of the guest into and out of use, and fits the guest to its
// memory.
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
	"sync"
	"time"

	"github.com/husk-containers/husk/agent/cgroup"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const (
	// margin is how long before the end of the caller's patience it is told what there
	// is, so that it hears it.
	margin = 500 * time.Millisecond
	// recheck is for memory that the kernel tells nothing of: virtio-mem fills up a
	// block that it has told of already.
	recheck = 200 * time.Millisecond
)

// Files are where a guest's kernel shows its CPUs and its memory.
type Files struct {
	// CPUs is /sys/devices/system/cpu.
	CPUs string
	// Meminfo is /proc/meminfo.
	Meminfo string
	// MinFree is /proc/sys/vm/min_free_kbytes.
	MinFree string
	// Containers is the cgroup of all containers.
	Containers cgroup.Dir
}

// A Machine is the CPUs and the memory of a guest.
type Machine struct {
	Files
	// keptKiB is what the kernel kept free of memory when the guest was booted.
	keptKiB uint64
	// fitting is held by who fits the guest to its memory: what is read is written by the
	// time that another reads. It waits for the kernel alone, to reclaim.
	fitting sync.Mutex
}

// New returns the Machine of a guest that has just been booted, fitted to its memory: see
// Fit.
func New(files Files) (*Machine, error) {
	m := &Machine{Files: files}
	content, err := os.ReadFile(m.MinFree)
	if err == nil {
		m.keptKiB, err = strconv.ParseUint(strings.TrimSpace(string(content)), 10, 54)
	}
	if err != nil {
		return nil, fmt.Errorf("read what is kept free of memory: %w", err)
	}
	return m, m.Fit()
}

// Online takes CPUs into use, the lowest first, or out of use, the highest first, until
// so many are, and waits until the guest has so many bytes of memory; 0 asks for
// nothing. It waits for CPUs and memory that are yet to appear, and shortly before ctx
// ends tells what is in use. The guest is fitted to its memory then: see Fit.
func (m *Machine) Online(ctx context.Context, cpus int, memory uint64) (*agentv1.OnlineResourcesResponse, error) {
	used, err := m.await(ctx, cpus, memory)
	if err == nil {
		err = m.Fit()
	}
	if err != nil {
		return nil, err
	}
	total, available, err := m.memory()
	if err != nil {
		return nil, err
	}
	return &agentv1.OnlineResourcesResponse{Cpus: uint32(used), MemoryBytes: total, AvailableBytes: available}, nil
}

// await returns how many CPUs are in use once they and the memory are as is wanted, or
// shortly before ctx ends.
func (m *Machine) await(ctx context.Context, cpus int, memory uint64) (int, error) {
	events, err := openUevents() // before the first look
	if err != nil {
		return 0, err
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
			return 0, err
		}
		total, _, err := m.memory()
		if err != nil {
			return 0, err
		}
		if (cpus == 0 || used == cpus) && total >= memory {
			return used, nil
		}
		if err := events.next(ctx, time.Now().Add(recheck)); ctx.Err() != nil {
			return used, nil
		} else if err != nil {
			return 0, err
		}
	}
}

// setCPUs takes as many CPUs as there are, and n at most, into use and the others out of
// it, and returns how many are in use. Where the kernel does not let one it stays as
// it is.
func (m *Machine) setCPUs(n int) (int, error) {
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

func (m *Machine) set(cpu int, online string) {
	file := filepath.Join(m.CPUs, fmt.Sprint("cpu", cpu), "online")
	err := os.WriteFile(file, []byte(online), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // the first CPU has none
		slog.Warn("switch CPU", "cpu", cpu, "online", online, "err", err)
	}
}

// list reads a list of CPUs, which is ascending.
func (m *Machine) list(name string) ([]int, error) {
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
