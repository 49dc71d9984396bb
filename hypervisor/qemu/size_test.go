package qemu

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	"github.com/husk-containers/husk/protocols/stream"
)

func TestSizeConformance(t *testing.T) {
	hypertest.ConformSize(t, func(t *testing.T) hypertest.SizeSubject {
		q, cfg := testGuest(t)
		cfg.MaxVCPUs, cfg.MaxMemoryMiB = cfg.VCPUs+2, cfg.MemoryMiB+256
		return hypertest.SizeSubject{
			Subject: hypertest.Subject{
				Hypervisor: q, Config: cfg, Port: stream.Port, Greet: offerToken,
			},
			Online: func(ctx context.Context, vm hypervisor.VM, n int) error {
				_, err := tell(ctx, vm, "online %d", n)
				return err
			},
			Await: func(ctx context.Context, vm hypervisor.VM, atLeast, atMost int) error {
				_, err := tell(ctx, vm, "memory %d %d", atLeast, atMost)
				return err
			},
		}
	})
}

// bootSized boots the test's guest with room to grow.
func bootSized(ctx context.Context, t *testing.T, change func(*QEMU, *hypervisor.Config)) (*vm, hypervisor.Config) {
	t.Helper()
	q, cfg := testGuest(t)
	change(q, &cfg)
	started, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := started.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	control, err := started.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() }) //nolint:errcheck // the VM may have ended
	return started.(*vm), cfg
}

// guestMemory is what the host holds of a QEMU's guest, in MiB: the blocks of its
// memfds, each of which a process has open once.
func guestMemory(t *testing.T, pid int) int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	blocks := int64(0)
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		to, err := os.Readlink(path)
		if errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(to, "/memfd:") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		blocks += st.Blocks
	}
	return int(blocks * 512 >> 20)
}

// cpuTime is what a process has used of the host's CPUs.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	ticks := 0
	for _, f := range fields[11:13] { // utime and stime, in hundredths: proc_pid_stat(5)
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func TestFreedMemoryGoesBackToTheHost(t *testing.T) {
	const touched, back = 1024, 10 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	for name, cfg := range map[string]hypervisor.Config{
		"of the boot": {MemoryMiB: 1536}, "plugged": {MemoryMiB: 512, MaxMemoryMiB: 1536},
	} {
		t.Run(name, func(t *testing.T) {
			vm, _ := bootSized(ctx, t, func(_ *QEMU, c *hypervisor.Config) {
				c.MemoryMiB, c.MaxMemoryMiB = cfg.MemoryMiB, cfg.MaxMemoryMiB
			})
			if cfg.MaxMemoryMiB > 0 {
				if got, err := vm.Resize(ctx, hypervisor.Size{VCPUs: 1, MemoryMiB: 1536}); err != nil || got.MemoryMiB != 1536 {
					t.Fatalf("Resize: %+v, %v", got, err)
				}
			}
			before := settled(ctx, t, vm) // what the boot left behind is reported too
			took, err := tell(ctx, vm, "touch %d", touched)
			if err != nil {
				t.Fatal(err)
			}
			start, peak := time.Now(), guestMemory(t, vm.PID())
			if peak < before+touched/2 {
				t.Errorf("the host holds %d MiB after the guest touched %d, and %d before", peak, touched, before)
			}
			awaitMemory(ctx, t, vm, before+touched/10)
			if took := time.Since(start); took > back {
				t.Errorf("the memory was back after %v, want %v", took, back)
			}
			t.Logf("before %d MiB, then %d, touched in %s ms; %d after %v", before, peak, took, guestMemory(t, vm.PID()), time.Since(start))
		})
	}
}

// settled waits until the host has got no more of the guest's memory back for a while.
func settled(ctx context.Context, t *testing.T, vm *vm) int {
	t.Helper()
	const quiet = 30 // ticks: Linux reports every 2 s
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	least := guestMemory(t, vm.PID())
	for since := 0; since < quiet; since++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("the guest's memory has not settled")
		}
		if now := guestMemory(t, vm.PID()); now < least {
			least, since = now, 0
		}
	}
	return least
}

// awaitMemory looks until the host holds no more than most MiB of the guest.
func awaitMemory(ctx context.Context, t *testing.T, vm *vm, most int) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for guestMemory(t, vm.PID()) > most {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("the host holds %d MiB of the guest, want %d", guestMemory(t, vm.PID()), most)
		}
	}
}

func TestPluggedMemoryReachesVirtiofsd(t *testing.T) {
	const mib, more = 160, 512
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	vm, cfg := bootSized(ctx, t, func(_ *QEMU, c *hypervisor.Config) { c.MaxMemoryMiB = c.MemoryMiB + more })
	dir := cfg.Devices[0].(hypervisor.Share).Dir
	sent := make([]byte, mib<<20)
	rand.Read(sent)
	if err := os.WriteFile(filepath.Join(dir, "file"), sent, 0o644); err != nil {
		t.Fatal(err)
	}
	copyFile := func(from, to string) {
		t.Helper()
		if _, err := tell(ctx, vm, "copy %s %s", from, to); err != nil {
			t.Fatal(err)
		}
		written, err := os.ReadFile(filepath.Join(dir, to))
		if err != nil || !bytes.Equal(written, sent) {
			t.Fatalf("the guest's copy has %d bytes, %v, and not those of the file", len(written), err)
		}
	}
	if got, err := vm.Resize(ctx, hypervisor.Size{VCPUs: 1, MemoryMiB: cfg.MemoryMiB + more}); err != nil {
		t.Fatalf("Resize: %+v, %v", got, err)
	}
	// Of file and copy more stays in the guest's cache than it had memory at the boot.
	copyFile("file", "first")
	if held := guestMemory(t, vm.PID()); held < cfg.MemoryMiB+mib/2 {
		t.Errorf("the host holds %d MiB of the guest: its cache has not reached what was plugged", held)
	}
	// The cache is given up for the memory's sake.
	if got, err := vm.Resize(ctx, hypervisor.Size{VCPUs: 1, MemoryMiB: cfg.MemoryMiB}); err != nil {
		t.Errorf("Resize: %+v, %v", got, err)
	}
	copyFile("first", "second")
}

func TestAPausedVMTakesNoCPU(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	vm, _ := bootSized(ctx, t, func(*QEMU, *hypervisor.Config) {})
	if _, err := tell(ctx, vm, "spin"); err != nil {
		t.Fatal(err)
	}
	used := func() time.Duration {
		before := cpuTime(t, vm.PID())
		time.Sleep(time.Second) // the time over which it is measured
		return cpuTime(t, vm.PID()) - before
	}
	if got := used(); got < 100*time.Millisecond {
		t.Errorf("a busy guest used %v of a second", got)
	}
	if err := vm.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if got := used(); got > 20*time.Millisecond {
		t.Errorf("a paused guest used %v of a second", got)
	}
	if err := vm.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if got := used(); got < 100*time.Millisecond {
		t.Errorf("a resumed guest used %v of a second", got)
	}
}

func TestMemoryIsBoundToANode(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	node := 0
	vm, cfg := bootSized(ctx, t, func(_ *QEMU, c *hypervisor.Config) {
		c.MemoryNode, c.MaxMemoryMiB = &node, c.MemoryMiB+128
	})
	if got, err := vm.Resize(ctx, hypervisor.Size{VCPUs: 1, MemoryMiB: cfg.MaxMemoryMiB}); err != nil {
		t.Fatalf("Resize: %+v, %v", got, err)
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", vm.PID()))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("the kernel has no numa_maps")
	}
	if err != nil {
		t.Fatal(err)
	}
	bound := 0
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, "memfd:") && strings.Contains(line, "bind:0") {
			bound++
		}
	}
	if bound != 2 {
		t.Errorf("%d of the guest's pieces of memory are bound to node 0, want 2:\n%s", bound, maps)
	}
}

func TestANodeThatIsNotThereIsAnError(t *testing.T) {
	q, cfg := realQEMU(t)
	node := 63
	cfg.MemoryNode = &node
	vm, err := q.Start(t.Context(), cfg)
	if err == nil {
		vm.Stop(t.Context()) //nolint:errcheck // it failed already
		t.Fatal("Start succeeded")
	}
	t.Log(err)
}

func TestVCPUThreadsHaveNames(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), trafficTimeout)
	t.Cleanup(cancel)
	vm, _ := bootSized(ctx, t, func(_ *QEMU, c *hypervisor.Config) { c.VCPUs = 2 })
	threads, err := vm.VCPUThreads(ctx)
	if err != nil || len(threads) != 2 {
		t.Fatalf("VCPUThreads: %v, %v", threads, err)
	}
	for number, tid := range threads {
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/comm", vm.PID(), tid))
		if want := fmt.Sprintf("CPU %d/", number); err != nil || !strings.HasPrefix(string(name), want) {
			t.Errorf("vCPU %d's thread is named %q, %v; want %q", number, name, err, want)
		}
	}
}
