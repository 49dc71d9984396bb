package resource

import (
	"encoding/json"
	"maps"
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const mib = 1 << 20

var bounds = Bounds{DefaultVCPUs: 1, DefaultMemoryMiB: 256, MaxVCPUs: 8, MaxMemoryMiB: 16 << 10}

// cpus are so many thousandths of a CPU.
func cpus(milli int64) int64 { return milli * nanoCPU / 1000 }

func TestOfSpec(t *testing.T) {
	for name, tt := range map[string]struct {
		resources string
		want      Limits
	}{
		"nothing":                {`{}`, Limits{}},
		"half a CPU":             {`{"cpu":{"quota":50000,"period":100000}}`, Limits{NanoCPUs: cpus(500)}},
		"another period":         {`{"cpu":{"quota":50000,"period":20000}}`, Limits{NanoCPUs: cpus(2500)}},
		"the kernel's period":    {`{"cpu":{"quota":250000}}`, Limits{NanoCPUs: cpus(2500)}},
		"a period alone":         {`{"cpu":{"period":100000}}`, Limits{}},
		"no quota":               {`{"cpu":{"quota":-1,"period":100000}}`, Limits{}},
		"shares are no limit":    {`{"cpu":{"shares":4096}}`, Limits{}},
		"least":                  {`{"cpu":{"quota":1,"period":18446744073709551615}}`, Limits{NanoCPUs: 1}},
		"most":                   {`{"cpu":{"quota":9223372036854775807,"period":1}}`, Limits{NanoCPUs: math.MaxInt64}},
		"memory":                 {`{"memory":{"limit":268435456}}`, Limits{MemoryBytes: 256 * mib}},
		"no memory limit":        {`{"memory":{"limit":-1}}`, Limits{}},
		"cgroup v1's word":       {`{"memory":{"limit":9223372036854771712}}`, Limits{}},
		"a reservation is none":  {`{"memory":{"reservation":268435456}}`, Limits{}},
		"unified":                {`{"memory":{"limit":1},"cpu":{"quota":1},"unified":{"memory.max":"268435456\n","cpu.max":"150000 100000"}}`, Limits{cpus(1500), 256 * mib}},
		"unified without period": {`{"unified":{"cpu.max":"150000"}}`, Limits{NanoCPUs: cpus(1500)}},
		"unified without limits": {`{"memory":{"limit":1},"cpu":{"quota":1},"unified":{"memory.max":"max","cpu.max":"max 50000"}}`, Limits{}},
	} {
		var r specs.LinuxResources
		if err := json.Unmarshal([]byte(tt.resources), &r); err != nil {
			t.Fatal(err)
		}
		if got, err := OfSpec(&r); err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
	if got, err := OfSpec(nil); got != (Limits{}) || err != nil {
		t.Errorf("nil: %+v, %v", got, err)
	}
	for key, value := range map[string]string{"memory.max": "256M", "cpu.max": "max none"} {
		_, err := OfSpec(&specs.LinuxResources{Unified: map[string]string{key: value}})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "unified ("+key+")") {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
	if got := OfPod(0, 100000, 0); got != (Limits{}) {
		t.Errorf("a pod without limits: %+v", got)
	}
}

func TestBoot(t *testing.T) {
	for name, tt := range map[string]struct {
		limits Limits
		vcpus  int
		// memory is what containers have to have, in MiB; 0: the default VM.
		memory int64
	}{
		"no limit":               {Limits{}, 1, 0},
		"a CPU limit alone":      {Limits{NanoCPUs: cpus(2000)}, 2, 0},
		"a memory limit alone":   {Limits{MemoryBytes: 512 * mib}, 1, 512},
		"both":                   {Limits{cpus(1500), 2048 * mib}, 2, 2048},
		"a fraction of a CPU":    {Limits{NanoCPUs: cpus(10)}, 1, 0},
		"just above a whole one": {Limits{NanoCPUs: cpus(3000) + 1}, 4, 0},
		"as much as may be":      {Limits{NanoCPUs: cpus(8000)}, 8, 0},
		"three thirds":           {Limits{NanoCPUs: 3 * limits(1, 3, 0).NanoCPUs}, 1, 0},
		"a fraction of a MiB":    {Limits{MemoryBytes: 512*mib + 1}, 1, 512},
	} {
		s, err := bounds.Boot(tt.limits)
		if err != nil || s.VCPUs != tt.vcpus {
			t.Errorf("%s: %+v, %v, want %d vCPUs", name, s, err, tt.vcpus)
		}
		if tt.memory == 0 && s.MemoryMiB != 256 {
			t.Errorf("%s: %d MiB, want the default", name, s.MemoryMiB)
		}
		if has := memTotalKiB(int64(s.MemoryMiB), 2) << 10; tt.memory > 0 && has < tt.limits.MemoryBytes {
			t.Errorf("%s: MemTotal is %d of a VM of %d MiB", name, has, s.MemoryMiB)
		}
	}
}

// The VM is the smallest in which the limit can be used.
func TestMemoryForIsTheLeast(t *testing.T) {
	for _, limit := range []int64{64, 100, 128, 256, 1000, 1024, 2700, 2800, 4096, 65536, 1 << 20} {
		for _, cpus := range []int64{1, 2, 64} {
			m := int64(memoryFor(limit*mib, int(cpus), int(cpus)))
			if usableKiB(m, cpus, cpus) < limit<<10 || usableKiB(m-1, cpus, cpus) >= limit<<10 {
				t.Errorf("%d MiB with %d CPUs: %d MiB", limit, cpus, m)
			}
		}
	}
	if m := memoryFor(1, 1, 1); m != minVMMiB {
		t.Errorf("a byte: %d MiB", m)
	}
	if m := memoryFor(math.MaxInt64, 1, 1); m <= 1<<43 {
		t.Errorf("the largest limit: %d MiB", m)
	}
}

// What guests were measured to have, by decision 028.
func TestMemTotalIsNoMoreThanMeasured(t *testing.T) {
	for _, m := range []struct{ mib, cpus, totalKiB int64 }{
		{128, 1, 93508},
		{256, 1, 222340},
		{512, 1, 480004},
		{1024, 1, 995332},
		{2048, 1, 2025988},
		{2560, 1, 2539012},
		{2816, 1, 2797052},
		{3072, 1, 3055108},
		{4096, 1, 4087288},
		{8192, 1, 8209920},
		{16384, 1, 16455160},
		{256, 2, 222376},
		{256, 4, 221888},
		{256, 8, 220912},
		{256, 16, 218956},
		{256, 32, 213892},
		{512, 16, 476620},
		{1024, 4, 994880},
	} {
		got := memTotalKiB(m.mib, m.cpus)
		if got > m.totalKiB || got < m.totalKiB-5<<10 {
			t.Errorf("%d MiB, %d CPUs: %d KiB, measured %d", m.mib, m.cpus, got, m.totalKiB)
		}
	}
}

func TestBootRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		limits Limits
		class  func(error) bool
		want   []string
	}{
		"too little memory": {Limits{MemoryBytes: MinMemoryBytes - 1}, errdefs.IsInvalidArgument, []string{"a memory limit of", "raise the limit"}},
		"too many CPUs":     {Limits{NanoCPUs: cpus(8001)}, errdefs.IsFailedPrecondition, []string{"a CPU limit of 8.001 needs 9 vCPUs", "at most 8", "hypervisor.max_vcpus"}},
		"too much memory":   {Limits{MemoryBytes: 16 << 30}, errdefs.IsFailedPrecondition, []string{"a memory limit of 16384 MiB needs a VM of", "at most 16384", "hypervisor.max_memory_mib"}},
		"both":              {Limits{math.MaxInt64, math.MaxInt64}, errdefs.IsFailedPrecondition, []string{"hypervisor.max_vcpus", "hypervisor.max_memory_mib"}},
	} {
		_, err := bounds.Boot(tt.limits)
		if !tt.class(err) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v does not say %q", name, err, want)
			}
		}
	}
	small := Bounds{DefaultVCPUs: 4, DefaultMemoryMiB: 512, MaxVCPUs: 2, MaxMemoryMiB: 300}
	if s, err := small.Boot(Limits{}); err != nil || s != (Size{2, 300}) {
		t.Errorf("a default above the host: %+v, %v", s, err)
	}
}

func TestGrown(t *testing.T) {
	boot := Size{1, 256}
	with := func(limit int64) int { return memoryFor(limit*mib, 1, 1) }
	for name, tt := range map[string]struct {
		boot       Size
		containers map[string]Limits
		want       Size
	}{
		"none":                              {boot, nil, boot},
		"within":                            {boot, map[string]Limits{"a": {cpus(500), 64 * mib}, "b": {cpus(500), 32 * mib}}, boot},
		"more together":                     {boot, map[string]Limits{"a": {cpus(700), 0}, "b": {cpus(700), 0}}, Size{2, 256}},
		"more memory together":              {boot, map[string]Limits{"a": {0, 256 * mib}, "b": {0, 256 * mib}}, Size{1, with(512)}},
		"never less than at boot":           {Size{4, 4096}, map[string]Limits{"a": {cpus(100), 64 * mib}}, Size{4, 4096}},
		"one without, at least the default": {Size{1, 150}, map[string]Limits{"a": {cpus(100), 64 * mib}, "b": {}}, Size{1, 256}},
		"one without, and more than it":     {boot, map[string]Limits{"a": {cpus(1100), 512 * mib}, "b": {}}, Size{2, with(512)}},
		"all with, less than the default":   {Size{1, 130}, map[string]Limits{"a": {cpus(100), 64 * mib}}, Size{1, with(64)}},
	} {
		before := maps.Clone(tt.containers)
		got, err := bounds.Grown(tt.boot, tt.containers)
		if tt.want.VCPUs > 1 && tt.want.MemoryMiB == with(512) {
			tt.want.MemoryMiB = memoryFor(512*mib, tt.want.VCPUs, tt.want.VCPUs)
		}
		if err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
		if !maps.Equal(before, tt.containers) {
			t.Errorf("%s: the containers have changed", name)
		}
	}
	_, err := bounds.Grown(boot, map[string]Limits{"b": {cpus(5000), 0}, "a": {cpus(4000), 0}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "containers a, b together: a CPU limit of 9 needs 9 vCPUs") {
		t.Errorf("%v", err)
	}
	_, err = bounds.Grown(boot, map[string]Limits{"a": {0, 1}, "b": {0, 512 * mib}})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "container a: a memory limit of 1 bytes") {
		t.Errorf("%v", err)
	}
}

func TestKernelParams(t *testing.T) {
	if got, want := KernelParams(Size{1, 1131}), "sysctl.vm.min_free_kbytes=4304"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
