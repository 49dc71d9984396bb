package resource

import (
	"fmt"
	"math"
)

// What a guest's system takes, in KiB, as decision 028 has it measured (eleven sizes,
// six numbers of CPUs), with slack of a few MiB.
const (
	// The kernel keeps this from MemTotal of any VM, for itself, firmware and tables:
	// 35,340, and up to 37,630 between 2 and 4 GiB.
	fixedKiB = 37_700
	// It keeps half so many of each MiB: 64 bytes describe a page, a tenth comes on top.
	shareHalfKiB = 35
	// It keeps this for each CPU that may ever be, beyond the first two.
	possibleCPUKiB = 290
	// This is in use of MemTotal, besides what containers have: agent, image and the
	// kernel's own, for the guest and for each CPU; 3 to 6 MiB of it are slack.
	systemKiB    = 41 << 10
	systemCPUKiB = 900
	// From so much memory on the kernel has huge pages, and takes and hoards them.
	hugeFromKiB = 500 << 10
	hugeKiB     = 8 << 10
	// The zone below 16 MiB keeps so many KiB of itself back for each MiB above it, and
	// the one below 4 GiB for each above that (lowmem_reserve_ratio in Linux, 256).
	reserveKiB = 4
	// zoneDMAKiB is all there is of the first.
	zoneDMAKiB = 15 << 10
	// q35 has memory above 4 GiB in a VM of highFromMiB, and then lowMiB below it. Another
	// zone takes this for itself.
	highFromMiB = 0xb0000000 >> 20
	lowMiB      = 2 << 10
	highKiB     = 8 << 10
)

const (
	// minMemoryMiB is the least limit of a container: with half of it a shell starts in
	// the guest, with a quarter nothing does.
	minMemoryMiB = 1
	// minVMMiB is the smallest VM that is tried, as for hypervisor.default_memory_mib.
	minVMMiB = 128
)

// memTotalKiB is what /proc/meminfo has as MemTotal, at least, in a VM of so many MiB.
func memTotalKiB(mib, possible int64) int64 {
	return mib<<10 - fixedKiB - (mib*shareHalfKiB+1)/2 - max(0, possible-2)*possibleCPUKiB
}

// usableKiB is what containers can use of it.
func usableKiB(mib, vcpus, possible int64) int64 {
	total := memTotalKiB(mib, possible)
	kept := minFreeKiB(mib) + min(zoneDMAKiB, mib*reserveKiB)
	if total >= hugeFromKiB {
		kept += hugeKiB
	}
	if mib >= highFromMiB {
		kept += (mib-lowMiB)*reserveKiB + highKiB
	}
	return total - systemKiB - vcpus*systemCPUKiB - kept
}

// memoryFor returns the least MiB of a VM in which containers can use so many bytes.
func memoryFor(bytes int64, vcpus, possible int) int {
	want := ceilDiv(bytes, 1<<10)
	mib := max(minVMMiB, ceilDiv(want, 1<<10))
	for {
		missing := want - usableKiB(mib, int64(vcpus), int64(possible))
		if missing <= 0 {
			return int(mib)
		}
		mib += ceilDiv(missing, 1<<10)
	}
}

// minFreeKiB is what the kernel keeps free for itself: what it computes before it
// reckons with huge pages, for which it would raise that to 44 MiB and more
// (init_per_zone_wmark_min and set_recommended_min_free_kbytes in Linux).
func minFreeKiB(mib int64) int64 {
	return int64(min(max(math.Sqrt(float64(mib)*(1<<10)*16), 128), 1<<18))
}

// KernelParams are what the figures hold with: little is kept free.
func KernelParams(s Size) string {
	return fmt.Sprintf("sysctl.vm.min_free_kbytes=%d", minFreeKiB(int64(s.MemoryMiB)))
}
