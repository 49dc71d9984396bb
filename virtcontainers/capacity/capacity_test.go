package capacity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/resource"
)

// bench is a table of a VM with up to four vCPUs, and what was done to it.
type bench struct {
	t     *testing.T
	table *Table

	mu       sync.Mutex
	size     hypervisor.Size
	fail     error // of Resize
	confined map[string]string
	bound    [][]int // memory
}

func newBench(t *testing.T, pin bool) *bench {
	b := &bench{t: t, confined: map[string]string{}}
	h := config.Default().Hypervisor
	h.VCPUPinning = pin
	host := placement.Host{CPUs: []int{0, 1, 2, 3}, Nodes: map[int][]int{0: {0, 1}, 1: {2, 3}}}
	started, err := boot(h, resource.Limits{NanoCPUs: 2e9, MemoryBytes: 256 << 20}, placement.Container{ID: "pod"}, host, 4096)
	if err != nil {
		t.Fatal(err)
	}
	b.size = hypervisor.Size(started.Size)
	b.table = New(Options{
		Machine: b, Boot: started, Log: slog.New(slog.DiscardHandler), Processes: func() []int { return nil },
		Confine: func(_ context.Context, id, cpus string) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.confined[id] = cpus
			return nil
		},
		BindMemory: func(nodes []int) error { b.bound = append(b.bound, nodes); return nil },
	})
	return b
}

func (b *bench) Size() hypervisor.Size {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

func (b *bench) Resize(_ context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail != nil {
		return b.size, b.fail
	}
	b.size = want
	return want, nil
}

// VCPUThreads are none that could be bound: CPUs of the test's host are not its own.
func (b *bench) VCPUThreads(context.Context) (map[int]int, error) { return nil, nil }

// change claims, and returns the CPUs that the container was told.
func (b *bench) change(id string, mib int64, cpus string) (string, error) {
	told := "nothing"
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{}}
	if mib > 0 {
		limit := mib << 20
		r.Memory.Limit = &limit
	}
	quota := int64(100000)
	r.CPU = &specs.LinuxCPU{Quota: &quota}
	err := b.table.Change(b.t.Context(), id, Claim{Resources: r, CPUs: cpus}, func(cpus string) error {
		told = cpus
		return nil
	})
	return told, err
}

func TestTheVMGrowsAndShrinksWithItsClaims(t *testing.T) {
	b := newBench(t, false)
	booted := b.Size()
	for _, id := range []string{"a", "b"} { // what was announced
		if told, err := b.change(id, 128, ""); err != nil || told != "" || b.Size() != booted {
			t.Fatalf("%s: told %q, %v; the VM has %+v, had %+v", id, told, err, b.Size(), booted)
		}
	}
	if _, err := b.change("c", 512, ""); err != nil {
		t.Fatal(err)
	}
	if got := b.Size(); got.VCPUs != 3 || got.MemoryMiB < booted.MemoryMiB+512 {
		t.Errorf("with one more container the VM has %+v, had %+v", got, booted)
	}
	b.table.Drop("c")
	b.table.Settle(t.Context())
	if got := b.Size(); got != booted {
		t.Errorf("without it the VM has %+v, want %+v", got, booted)
	}
}

func TestWhatIsRefusedChangesNothing(t *testing.T) {
	b := newBench(t, false)
	if _, err := b.change("a", 256, ""); err != nil {
		t.Fatal(err)
	}
	booted := b.Size()
	b.fail = errors.New("no memory on the host")
	if _, err := b.change("b", 512, ""); !errors.Is(err, b.fail) || !strings.Contains(err.Error(), "resize the VM from") {
		t.Errorf("%v", err)
	}
	b.fail = nil
	refused := errors.New("the guest refuses")
	limit := int64(1 << 30)
	err := b.table.Change(t.Context(), "b", Claim{Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}, CPUs: "1"}, func(string) error {
		if b.Size().MemoryMiB < 1024 {
			t.Errorf("the guest is asked when the VM has %+v", b.Size())
		}
		return refused
	})
	if !errors.Is(err, refused) {
		t.Errorf("%v", err)
	}
	if _, err := b.change("b", 64<<10, ""); err != nil { // all that the host has
		t.Errorf("a limit above what the host has: %v", err)
	}
	b.table.Drop("b")
	b.table.Settle(t.Context())
	if b.Size() != booted || b.table.Placement() != nil && b.table.Placement().CPUs() != nil {
		t.Errorf("the VM has %+v, want %+v, placed %+v", b.Size(), booted, b.table.Placement())
	}
	if _, err := b.change("d", 16, "9"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the host has no CPU 9") {
		t.Errorf("a CPU that there is not: %v", err)
	}
}

// Who comes and goes changes where the others run.
func TestPlacesFollowTheClaims(t *testing.T) {
	for _, pin := range []bool{false, true} {
		b := newBench(t, pin)
		if told, err := b.change("a", 64, "2-3"); err != nil || told != "" {
			t.Fatalf("alone on two CPUs with two vCPUs: told %q, %v", told, err)
		}
		if p := b.table.Placement(); !slices.Equal(p.CPUs(), []int{2, 3}) || !slices.Equal(p.Nodes, []int{1}) || len(p.VCPUs[0]) != map[bool]int{false: 2, true: 1}[pin] {
			t.Errorf("pinned %v: %+v", pin, p)
		}
		told, err := b.change("b", 64, "0")
		if err != nil || told == "" || b.confined["a"] == "" || told == b.confined["a"] {
			t.Errorf("told b %q and a %q, %v", told, b.confined["a"], err)
		}
		if _, err := b.change("c", 64, "1"); err != nil { // it brings a third vCPU
			t.Errorf("three sets on three vCPUs: %v", err)
		}
		b.table.Drop("b")
		b.table.Drop("c")
		b.table.Settle(t.Context())
		if b.confined["a"] != "" {
			t.Errorf("alone again, a runs on %q", b.confined["a"])
		}
		if want := [][]int{{1}, nil, {1}}; fmt.Sprint(b.bound) != fmt.Sprint(want) {
			t.Errorf("memory was bound to %v, want %v", b.bound, want)
		}
	}
}

func TestMerged(t *testing.T) {
	number := func(n int64) *int64 { return &n }
	old := Claim{CPUs: "0-1", Resources: &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Quota: number(50000)}, Memory: &specs.LinuxMemory{Limit: number(100)},
		Unified: map[string]string{"cpu.max": "1000 2000", "memory.max": "7"},
	}}
	got := old.Merged(Claim{Mems: "1", Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: number(200)}}})
	if got.CPUs != "0-1" || got.Mems != "1" || *got.Resources.CPU.Quota != 50000 || *got.Resources.Memory.Limit != 200 {
		t.Errorf("%+v, %+v", got, got.Resources)
	}
	if want := map[string]string{"cpu.max": "1000 2000"}; !maps.Equal(got.Resources.Unified, want) {
		t.Errorf("unified is %v, want %v", got.Resources.Unified, want)
	}
	if old.Resources.Unified["memory.max"] != "7" {
		t.Error("the old claim has changed")
	}
	if got := (Claim{}).Merged(Claim{}); got.Resources == nil {
		t.Errorf("%+v", got)
	}
}

func TestBoot(t *testing.T) {
	host := placement.Host{CPUs: make([]int, 64), Nodes: map[int][]int{}}
	for i := range host.CPUs {
		host.CPUs[i] = i
	}
	host.Nodes[0] = host.CPUs
	h := config.Default().Hypervisor
	for name, tt := range map[string]struct {
		max, maxMiB int
		l           resource.Limits
		vcpus, room int
		err         string
	}{
		"no limit":              {l: resource.Limits{}, vcpus: h.DefaultVCPUs, room: roomVCPUs},
		"more than the room":    {l: resource.Limits{NanoCPUs: 12e9}, vcpus: 12, room: 12},
		"more than the host":    {l: resource.Limits{NanoCPUs: 100e9}, vcpus: 64, room: 64},
		"more than the maximum": {max: 4, l: resource.Limits{NanoCPUs: 5e9}, err: "max_vcpus"},
		"as configured":         {max: 16, l: resource.Limits{NanoCPUs: 5e9}, vcpus: 5, room: 16},
		"too much memory":       {maxMiB: 512, l: resource.Limits{MemoryBytes: 1 << 30}, err: "max_memory_mib"},
	} {
		h.MaxVCPUs, h.MaxMemoryMiB = tt.max, tt.maxMiB
		b, err := boot(h, tt.l, placement.Container{ID: "c"}, host, 1<<16)
		if tt.err != "" {
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || b.VCPUs != tt.vcpus || b.Bounds.MaxVCPUs != tt.room {
			t.Errorf("%s: %+v, %v", name, b, err)
		}
	}
	b, err := Plan(h, resource.Limits{}, placement.Container{ID: "c", CPUs: "8191"})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("on this host, %s: %+v, %v", os.Args[0], b, err)
	}
}

// A VM whose claims make no sense any more stays as it is.
func TestSettleWithoutASize(t *testing.T) {
	b := newBench(t, false)
	booted := b.Size()
	b.table.claims["a"] = Claim{Resources: &specs.LinuxResources{Unified: map[string]string{"memory.max": "much"}}}
	b.table.Settle(t.Context())
	if got := b.Size(); got != booted {
		t.Errorf("the VM has %+v, had %+v", got, booted)
	}
}
