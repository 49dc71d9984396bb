package cgroup

import (
	"errors"
	"io/fs"
	"math"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

var statFiles = map[string]string{
	"cpu.stat":            "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\nnr_bursts 4\nburst_usec 5",
	"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=6",
	"memory.stat":         "anon 1\nfile 2\nkernel_stack 3\ninactive_file 4\nworkingset_refault_anon 5\nworkingset_refault_file 6\nworkingset_activate_anon 7\nworkingset_activate_file 8\npgfault 9\nunknown 10",
	"memory.current":      "11",
	"memory.max":          "max",
	"memory.peak":         "12",
	"memory.swap.current": "13",
	"memory.swap.max":     "14",
	"memory.events":       "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6",
	"pids.current":        "15",
	"pids.max":            "16",
	"io.stat":             "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 \nnonsense\n9:1 rbytes=7",
}

func TestStats(t *testing.T) {
	s, err := scratch(t, statFiles).Stats()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
	s.Hugetlb = nil // as many as this machine has sizes
	want := &agentv1.StatsContainerResponse{
		Cpu: &agentv1.CPUStats{
			UsageUsec: 30, UserUsec: 10, SystemUsec: 20, NrPeriods: 1, NrThrottled: 2, ThrottledUsec: 3, NrBursts: 4, BurstUsec: 5,
			Pressure: &agentv1.Pressure{Some: &agentv1.PressureLine{Avg10: 1.5, Avg60: 0.25, Total: 7}, Full: &agentv1.PressureLine{Total: 6}},
		},
		Memory: &agentv1.MemoryStats{
			Usage: 11, UsageLimit: math.MaxUint64, MaxUsage: 12, SwapUsage: 13, SwapLimit: 14,
			Anon: 1, File: 2, KernelStack: 3, InactiveFile: 4, WorkingsetRefault: 11, WorkingsetActivate: 15, Pgfault: 9,
		},
		MemoryEvents: &agentv1.MemoryEvents{Low: 1, High: 2, Max: 3, Oom: 4, OomKill: 5, OomGroupKill: 6},
		Pids:         &agentv1.PidsStats{Current: 15, Limit: 16},
		Io: &agentv1.IOStats{Devices: []*agentv1.DeviceIO{
			{Major: 8, Rbytes: 1, Wbytes: 2, Rios: 3, Wios: 4}, {Major: 254, Minor: 16}, {Major: 9, Minor: 1, Rbytes: 7},
		}},
	}
	if diff := cmp.Diff(want, s, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestStatsOfNoCgroup(t *testing.T) {
	if s, err := Dir(filepath.Join(t.TempDir(), "none")).Stats(); !errors.Is(err, fs.ErrNotExist) {
		t.Error(s, err)
	}
}

func TestPageSize(t *testing.T) {
	for size, want := range map[uint64]string{64 << 10: "64KB", 2 << 20: "2MB", 1 << 30: "1GB"} {
		if got := PageSize(size); got != want {
			t.Errorf("%d: %q", size, got)
		}
	}
}

// FuzzStats holds that whatever a file has the answer is valid.
func FuzzStats(f *testing.F) {
	for _, content := range statFiles {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		s := &agentv1.StatsContainerResponse{Io: &agentv1.IOStats{Devices: devices(content), Pressure: pressure(content)}}
		if err := s.Validate(); err != nil {
			t.Error(err)
		}
		value(content, "max")
		if set, err := ParseSet(string(content)); err == nil && len(set) > 4096 {
			t.Error(len(set))
		}
		parseBytes(string(content)) //nolint:errcheck // it does not panic
	})
}
