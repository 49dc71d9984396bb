// Package metrics is what containerd is told of what a container uses: the guest's
// statistics in the form of a cgroup of version 2, whatever the host has.
package metrics

import (
	"github.com/containerd/cgroups/v3/cgroup2/stats"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/cgroup"
)

// Of returns a valid response in containerd's form. The numbers are the guest's word.
func Of(r *agentv1.StatsContainerResponse) *stats.Metrics {
	m := &stats.Metrics{
		Pids:   &stats.PidsStat{Current: r.GetPids().GetCurrent(), Limit: r.GetPids().GetLimit()},
		CPU:    cpu(r.GetCpu()),
		Memory: memory(r.GetMemory()),
		Io:     &stats.IOStat{PSI: pressure(r.GetIo().GetPressure())},
	}
	e := r.GetMemoryEvents()
	m.MemoryEvents = &stats.MemoryEvents{
		Low: e.GetLow(), High: e.GetHigh(), Max: e.GetMax(),
		Oom: e.GetOom(), OomKill: e.GetOomKill(), OomGroupKill: e.GetOomGroupKill(),
	}
	for _, d := range r.GetIo().GetDevices() {
		m.Io.Usage = append(m.Io.Usage, &stats.IOEntry{
			Major: uint64(d.GetMajor()), Minor: uint64(d.GetMinor()),
			Rbytes: d.GetRbytes(), Wbytes: d.GetWbytes(), Rios: d.GetRios(), Wios: d.GetWios(),
		})
	}
	for _, h := range r.GetHugetlb() {
		m.Hugetlb = append(m.Hugetlb, &stats.HugeTlbStat{
			Current: h.GetCurrent(), Max: h.GetMax(), Pagesize: h.GetPageSize(), Failcnt: h.GetFailcnt(),
		})
	}
	for _, i := range r.GetInterfaces() {
		m.Network = append(m.Network, &stats.NetworkStat{
			Name:    i.GetName(),
			RxBytes: i.GetRxBytes(), RxPackets: i.GetRxPackets(), RxErrors: i.GetRxErrors(), RxDropped: i.GetRxDropped(),
			TxBytes: i.GetTxBytes(), TxPackets: i.GetTxPackets(), TxErrors: i.GetTxErrors(), TxDropped: i.GetTxDropped(),
		})
	}
	return m
}

// OfHost returns what a pod uses of the host in containerd's form.
func OfHost(u cgroup.Usage) *stats.Metrics {
	return &stats.Metrics{
		Pids:   &stats.PidsStat{Current: u.Pids},
		CPU:    &stats.CPUStat{UsageUsec: u.CPUMicros, UserUsec: u.UserMicros, SystemUsec: u.SystemMicros},
		Memory: &stats.MemoryStat{Usage: u.MemoryBytes, Anon: u.AnonBytes, InactiveFile: u.InactiveFileBytes},
	}
}

func cpu(c *agentv1.CPUStats) *stats.CPUStat {
	return &stats.CPUStat{
		UsageUsec: c.GetUsageUsec(), UserUsec: c.GetUserUsec(), SystemUsec: c.GetSystemUsec(),
		NrPeriods: c.GetNrPeriods(), NrThrottled: c.GetNrThrottled(), ThrottledUsec: c.GetThrottledUsec(),
		NrBursts: c.GetNrBursts(), BurstUsec: c.GetBurstUsec(), PSI: pressure(c.GetPressure()),
	}
}

func memory(m *agentv1.MemoryStats) *stats.MemoryStat {
	return &stats.MemoryStat{
		Anon: m.GetAnon(), File: m.GetFile(), KernelStack: m.GetKernelStack(), Slab: m.GetSlab(), Sock: m.GetSock(),
		Shmem: m.GetShmem(), FileMapped: m.GetFileMapped(), FileDirty: m.GetFileDirty(), FileWriteback: m.GetFileWriteback(),
		AnonThp: m.GetAnonThp(), InactiveAnon: m.GetInactiveAnon(), ActiveAnon: m.GetActiveAnon(),
		InactiveFile: m.GetInactiveFile(), ActiveFile: m.GetActiveFile(), Unevictable: m.GetUnevictable(),
		SlabReclaimable: m.GetSlabReclaimable(), SlabUnreclaimable: m.GetSlabUnreclaimable(),
		Pgfault: m.GetPgfault(), Pgmajfault: m.GetPgmajfault(), WorkingsetRefault: m.GetWorkingsetRefault(),
		WorkingsetActivate: m.GetWorkingsetActivate(), WorkingsetNodereclaim: m.GetWorkingsetNodereclaim(),
		Pgrefill: m.GetPgrefill(), Pgscan: m.GetPgscan(), Pgsteal: m.GetPgsteal(), Pgactivate: m.GetPgactivate(),
		Pgdeactivate: m.GetPgdeactivate(), Pglazyfree: m.GetPglazyfree(), Pglazyfreed: m.GetPglazyfreed(),
		ThpFaultAlloc: m.GetThpFaultAlloc(), ThpCollapseAlloc: m.GetThpCollapseAlloc(),
		Usage: m.GetUsage(), UsageLimit: m.GetUsageLimit(), MaxUsage: m.GetMaxUsage(),
		SwapUsage: m.GetSwapUsage(), SwapLimit: m.GetSwapLimit(), SwapMaxUsage: m.GetSwapMaxUsage(),
		PSI: pressure(m.GetPressure()),
	}
}

func pressure(p *agentv1.Pressure) *stats.PSIStats {
	if p == nil {
		return nil
	}
	return &stats.PSIStats{Some: pressureLine(p.GetSome()), Full: pressureLine(p.GetFull())}
}

func pressureLine(l *agentv1.PressureLine) *stats.PSIData {
	return &stats.PSIData{Avg10: l.GetAvg10(), Avg60: l.GetAvg60(), Avg300: l.GetAvg300(), Total: l.GetTotal()}
}
