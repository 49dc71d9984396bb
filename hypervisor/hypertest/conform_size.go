package hypertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// silence is for how long a paused guest is seen to answer nothing.
const silence = time.Second

// A SizeSubject is a backend whose VMs have every ability there is, with a guest that
// tells of its size. Of the guest is expected what Subject says.
type SizeSubject struct {
	Subject
	// Online has the guest take n vCPUs into use, once it has them, and all others out
	// of it.
	Online func(ctx context.Context, vm hypervisor.VM, n int) error
	// Await waits until the guest has at least, or at most, so many MiB of memory,
	// but for a tenth that it keeps to itself.
	Await func(ctx context.Context, vm hypervisor.VM, atLeast, atMost int) error
}

// able is a VM with every ability.
type able interface {
	hypervisor.VM
	hypervisor.Pauser
	hypervisor.Resizer
	hypervisor.Placer
	hypervisor.Balloon
}

// ConformSize is what the layers above rely on of a VM's abilities, as tests. make is
// called for each of them; it may skip. The Config has room for two more vCPUs and 256
// MiB more.
func ConformSize(t *testing.T, make func(t *testing.T) SizeSubject) {
	for _, c := range []struct {
		name string
		test func(context.Context, *testing.T, SizeSubject, able)
	}{
		{"a paused guest stands still", testPause},
		{"vCPUs come and go", testVCPUs},
		{"memory comes and goes", testMemory},
		{"Resize refuses what cannot be", testResizeRefuses},
		{"the balloon takes and gives", testBalloon},
		{"an ended VM has no abilities", testAbilitiesEnded},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
			t.Cleanup(cancel)
			s := make(t)
			one := &conformance{s.Subject, ctx}
			vm, ok := one.start(t).(able)
			if !ok {
				t.Fatal("the VM lacks an ability")
			}
			one.accept(t, vm)
			c.test(ctx, t, s, vm)
		})
	}
}

// greet makes a connection and talks on it.
func (s SizeSubject) greet(ctx context.Context, vm hypervisor.VM) error {
	conn, err := vm.Dial(ctx, s.Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	return s.Greet(ctx, conn)
}

func testPause(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	if err := s.greet(ctx, vm); err != nil {
		t.Fatal(err)
	}
	early, err := vm.Dial(ctx, s.Port)
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	for range 2 {
		if err := vm.Pause(ctx); err != nil {
			t.Fatalf("Pause: %v", err)
		}
	}
	short, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	if err := s.greet(short, vm); err == nil {
		t.Error("a paused guest has answered")
	}
	for range 2 {
		if err := vm.Resume(ctx); err != nil {
			t.Fatalf("Resume: %v", err)
		}
	}
	if err := s.Greet(ctx, early); err != nil {
		t.Errorf("on a connection of before the pause: %v", err)
	}
	if err := s.greet(ctx, vm); err != nil {
		t.Errorf("after the pause: %v", err)
	}
}

// threads checks that the VM has a thread for each of n vCPUs.
func threads(ctx context.Context, t *testing.T, vm able, n int) {
	t.Helper()
	got, err := vm.VCPUThreads(ctx)
	if err != nil || len(got) != n {
		t.Fatalf("VCPUThreads: %v, %v; want %d", got, err, n)
	}
	seen := map[int]bool{}
	for number := range n {
		tid := got[number]
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", vm.PID(), tid)); err != nil || seen[tid] {
			t.Errorf("vCPU %d has the thread %d, among %v: %v", number, tid, got, err)
		}
		seen[tid] = true
	}
}

func (s SizeSubject) boot() hypervisor.Size {
	return hypervisor.Size{VCPUs: s.Config.VCPUs, MemoryMiB: s.Config.MemoryMiB}
}

// resize brings the VM to want, which it can be.
func resize(ctx context.Context, t *testing.T, vm able, want hypervisor.Size) {
	t.Helper()
	start := time.Now()
	if got, err := vm.Resize(ctx, want); err != nil || got != want || vm.Size() != want {
		t.Fatalf("Resize to %+v: %+v, Size %+v, %v", want, got, vm.Size(), err)
	}
	t.Logf("Resize to %+v took %v", want, time.Since(start))
}

func testVCPUs(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	boot := s.boot()
	threads(ctx, t, vm, boot.VCPUs)
	for _, more := range []int{1, 2, 1, 0, 2} {
		want := boot
		want.VCPUs += more
		if want.VCPUs < vm.Size().VCPUs {
			if err := s.Online(ctx, vm, want.VCPUs); err != nil {
				t.Fatal(err)
			}
		}
		resize(ctx, t, vm, want)
		if err := s.Online(ctx, vm, want.VCPUs); err != nil {
			t.Fatal(err)
		}
		threads(ctx, t, vm, want.VCPUs)
	}
}

func testMemory(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	boot := s.boot()
	for _, more := range []int{128, 256, 64, 0, 256} {
		before, want := vm.Size(), boot
		want.MemoryMiB += more
		resize(ctx, t, vm, want)
		least, most := 0, want.MemoryMiB
		if want.MemoryMiB > before.MemoryMiB {
			least = want.MemoryMiB
		}
		if err := s.Await(ctx, vm, least, most); err != nil {
			t.Fatal(err)
		}
	}
	// Less than at the boot is that.
	if got, err := vm.Resize(ctx, hypervisor.Size{}); err != nil || got != boot {
		t.Errorf("Resize to nothing: %+v, %v; want %+v", got, err, boot)
	}
}

func testResizeRefuses(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	boot := s.boot()
	for name, want := range map[string]hypervisor.Size{
		"vCPUs":  {VCPUs: max(boot.VCPUs, s.Config.MaxVCPUs) + 1, MemoryMiB: boot.MemoryMiB + 128},
		"memory": {VCPUs: boot.VCPUs + 1, MemoryMiB: max(boot.MemoryMiB, s.Config.MaxMemoryMiB) + 1},
	} {
		if got, err := vm.Resize(ctx, want); !errdefs.IsInvalidArgument(err) || got != boot || vm.Size() != boot {
			t.Errorf("Resize to too much (%s): %+v, %v; want ErrInvalidArgument and no change", name, got, err)
		}
	}
	ended, end := context.WithCancelCause(ctx)
	why := errors.New("given up")
	end(why)
	if got, err := vm.Resize(ended, hypervisor.Size{VCPUs: boot.VCPUs, MemoryMiB: boot.MemoryMiB + 128}); !errors.Is(err, why) || got != boot {
		t.Errorf("Resize with an ended context: %+v, %v; want its cause and no change", got, err)
	}
	// Nothing of all that is in the way.
	resize(ctx, t, vm, hypervisor.Size{VCPUs: boot.VCPUs + 1, MemoryMiB: boot.MemoryMiB + 128})
}

func testBalloon(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	size := s.boot()
	size.MemoryMiB += 128
	resize(ctx, t, vm, size)
	less := size.MemoryMiB - 32
	for _, want := range []int{less, size.MemoryMiB, less, size.MemoryMiB + 1000} {
		got, err := vm.SetMemory(ctx, want)
		if err != nil || got != min(want, size.MemoryMiB) {
			t.Fatalf("SetMemory(%d): %d, %v", want, got, err)
		}
		if vm.Size() != size {
			t.Errorf("after SetMemory(%d) the size is %+v, want %+v", want, vm.Size(), size)
		}
	}
	if got, err := vm.SetMemory(ctx, 1); !errdefs.IsInvalidArgument(err) || got != size.MemoryMiB {
		t.Errorf("SetMemory(1): %d, %v; want ErrInvalidArgument and no change", got, err)
	}
}

func testAbilitiesEnded(ctx context.Context, t *testing.T, s SizeSubject, vm able) {
	if err := vm.Stop(ctx); err != nil {
		t.Fatalf("Stop: %v", err)
	}
	want := s.boot()
	want.VCPUs++
	_, resize := vm.Resize(ctx, want)
	_, balloon := vm.SetMemory(ctx, want.MemoryMiB)
	_, place := vm.VCPUThreads(ctx)
	for name, err := range map[string]error{
		"Pause": vm.Pause(ctx), "Resume": vm.Resume(ctx), "Resize": resize, "SetMemory": balloon, "VCPUThreads": place,
	} {
		if err == nil {
			t.Errorf("%s of an ended VM succeeded", name)
		}
	}
	if got := vm.Size(); got != s.boot() {
		t.Errorf("Size of an ended VM: %+v, want what it was", got)
	}
}
