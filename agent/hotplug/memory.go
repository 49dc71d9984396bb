package hotplug

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
)

const (
	// reserved is what of MemTotal the containers together may not have, in bytes, so that
	// the one that takes too much meets the limit of their cgroup, and not the end of the
	// guest: the agent and crun, and what the kernel needs for itself.
	reserved = 48 << 20
	// leastKeptKiB and mostKeptKiB bound what the kernel would keep free, as it does
	// (calculate_min_free_kbytes in Linux).
	leastKeptKiB, mostKeptKiB = 128, 256 << 10
)

// Fit makes what depends on the guest's memory fit what it has now: the limit of all
// containers, and what the kernel keeps free. Whenever memory comes or goes the kernel
// raises the latter, to 30 MiB and more where it has huge pages, which containers then
// lack; it is brought back to what it would be without them, or was at boot, if that is
// more.
func (m *Machine) Fit() error {
	m.fitting.Lock()
	defer m.fitting.Unlock()
	total, _, err := m.memory()
	if err != nil {
		return err
	}
	if err := m.Containers.FitMemory(containersShare(total)); err != nil {
		return fmt.Errorf("bound memory of containers: %w", err)
	}
	kept := strconv.FormatUint(max(m.keptKiB, minFreeKiB(total)), 10)
	if now, err := os.ReadFile(m.MinFree); err == nil && strings.TrimSpace(string(now)) == kept {
		return nil // each write has the kernel compute all zones anew
	}
	if err := os.WriteFile(m.MinFree, []byte(kept), 0); err != nil {
		return fmt.Errorf("keep %s KiB of memory free: %w", kept, err)
	}
	return nil
}

// containersShare is what containers may have of so many bytes.
func containersShare(total uint64) uint64 {
	if total > 2*reserved {
		return total - reserved
	}
	return total / 2 // of a guest that is hardly one
}

// minFreeKiB is what the kernel would keep free of so many bytes, without huge pages.
func minFreeKiB(total uint64) uint64 {
	return uint64(min(max(math.Sqrt(float64(total>>10)*16), leastKeptKiB), mostKeptKiB))
}

// Follow fits the guest to its memory whenever the kernel tells that some has come or
// gone, until ctx ends.
func (m *Machine) Follow(ctx context.Context) {
	err := watch(ctx, func() {
		if err := m.Fit(); err != nil {
			slog.Warn("memory has changed", "err", err)
		}
	})
	if err != nil {
		slog.Warn("changes of memory are not seen any more", "err", err)
	}
}

// memory returns MemTotal and MemAvailable, in bytes.
func (m *Machine) memory() (total, available uint64, err error) {
	content, err := os.ReadFile(m.Meminfo)
	if err != nil {
		return 0, 0, fmt.Errorf("read memory: %w", err)
	}
	for name, p := range map[string]*uint64{"MemTotal:": &total, "MemAvailable:": &available} {
		found := false
		for line := range strings.Lines(string(content)) { // MemTotal:   1000 kB
			if f := strings.Fields(line); len(f) == 3 && f[0] == name {
				kib, err := strconv.ParseUint(f[1], 10, 54)
				if err != nil {
					return 0, 0, fmt.Errorf("read memory: %w", err)
				}
				*p, found = kib<<10, true
			}
		}
		if !found {
			return 0, 0, fmt.Errorf("read memory: /proc/meminfo has no %s", strings.TrimSuffix(name, ":"))
		}
	}
	return total, available, nil
}
