package hypertest

import (
	"context"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/hypervisor"
)

// A sizing is how large a Loopback's VM is, and whether it stands still. The guest
// end's lock guards it.
type sizing struct {
	size    hypervisor.Size
	memory  int // MiB that the balloon leaves
	paused  bool
	threads []*thread
}

// least is what the balloon leaves of what a guest was booted with, in MiB.
const least = 64

// A thread of this process stands for a vCPU, so that it can be pinned.
type thread struct {
	id  int
	end chan struct{}
}

func newThread() *thread {
	t := &thread{end: make(chan struct{})}
	id := make(chan int)
	go func() { // until end is closed, by the VM's end at the latest
		runtime.LockOSThread() // and never unlocked: what was done to the thread ends with it
		id <- unix.Gettid()
		<-t.end
	}()
	t.id = <-id
	return t
}

// Pause implements hypervisor.Pauser: the guest is not dialled, though a function cannot be
// held.
func (v *VM) Pause(ctx context.Context) error { return v.setPaused(ctx, true) }

// Resume implements hypervisor.Pauser.
func (v *VM) Resume(ctx context.Context) error { return v.setPaused(ctx, false) }

func (v *VM) setPaused(ctx context.Context, paused bool) error {
	if err := v.usable(ctx); err != nil {
		return fmt.Errorf("pause or resume the VM: %w", err)
	}
	v.guest.change(func(s *sizing) { s.paused = paused })
	return nil
}

// Size implements hypervisor.Resizer.
func (v *VM) Size() hypervisor.Size { return v.guest.Size() }

// Resize implements hypervisor.Resizer; Loopback's Resize decides what comes of it.
func (v *VM) Resize(ctx context.Context, want hypervisor.Size) (hypervisor.Size, error) {
	cfg := v.guest.Config
	err := want.Check(hypervisor.Size{VCPUs: max(cfg.VCPUs, cfg.MaxVCPUs), MemoryMiB: max(cfg.MemoryMiB, cfg.MaxMemoryMiB)})
	if err == nil {
		err = v.usable(ctx)
	}
	if err != nil {
		return v.Size(), fmt.Errorf("resize the VM: %w", err)
	}
	got := hypervisor.Size{VCPUs: max(want.VCPUs, cfg.VCPUs), MemoryMiB: max(want.MemoryMiB, cfg.MemoryMiB)}
	if v.resize != nil {
		got, err = v.resize(got)
	}
	v.guest.change(func(s *sizing) {
		s.memory += got.MemoryMiB - s.size.MemoryMiB
		s.size = got
	})
	if err != nil {
		err = fmt.Errorf("resize the VM: %w", err)
	}
	return got, err
}

// SetMemory implements hypervisor.Balloon: the guest gives all that is asked for.
func (v *VM) SetMemory(ctx context.Context, mib int) (int, error) {
	if err := v.usable(ctx); err != nil {
		return 0, fmt.Errorf("set the guest's memory: %w", err)
	}
	left, err := 0, error(nil)
	v.guest.change(func(s *sizing) {
		floor := s.size.MemoryMiB - v.guest.Config.MemoryMiB + least // what was plugged stays
		if mib < floor {
			err = fmt.Errorf("set the guest's memory: %d MiB, and the guest keeps at least %d: %w", mib, floor, errdefs.ErrInvalidArgument)
		} else {
			s.memory = min(mib, s.size.MemoryMiB)
		}
		left = s.memory
	})
	return left, err
}

// VCPUThreads implements hypervisor.Placer: threads of this process, which do nothing.
func (v *VM) VCPUThreads(ctx context.Context) (map[int]int, error) {
	if err := v.usable(ctx); err != nil {
		return nil, fmt.Errorf("find the vCPUs' threads: %w", err)
	}
	threads := map[int]int{}
	v.guest.change(func(s *sizing) {
		for len(s.threads) < s.size.VCPUs {
			s.threads = append(s.threads, newThread())
		}
		s.trim(s.size.VCPUs)
		for number, t := range s.threads {
			threads[number] = t.id
		}
	})
	return threads, nil
}

// trim ends the threads of vCPUs that are not there.
func (s *sizing) trim(vcpus int) {
	for len(s.threads) > vcpus {
		last := len(s.threads) - 1
		close(s.threads[last].end)
		s.threads = s.threads[:last]
	}
}

func (g *GuestEnd) change(f func(*sizing)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f(&g.sizing)
	if g.closed {
		g.trim(0)
	}
	g.cond.Broadcast()
}

// Size is what the VM has at this moment.
func (g *GuestEnd) Size() hypervisor.Size {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.size
}

// Memory is what the guest is to make do with, in MiB.
func (g *GuestEnd) Memory() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.memory
}

// Paused tells whether the VM stands still.
func (g *GuestEnd) Paused() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.paused
}

// AwaitSize waits until the VM's size is as wanted.
func (g *GuestEnd) AwaitSize(ctx context.Context, wanted func(hypervisor.Size) bool) error {
	defer context.AfterFunc(ctx, g.cond.Broadcast)()
	g.mu.Lock()
	defer g.mu.Unlock()
	for !wanted(g.size) {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for a size, which is %+v: %w", g.size, context.Cause(ctx))
		}
		if g.closed {
			return errEnded
		}
		g.cond.Wait()
	}
	return nil
}
