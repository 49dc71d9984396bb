package hypertest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	"github.com/husk-containers/husk/protocols/stream"
)

func sizeConfig(t *testing.T) hypervisor.Config {
	return hypervisor.Config{ID: "test", Dir: t.TempDir(), VCPUs: 1, MemoryMiB: 128, MaxVCPUs: 3, MaxMemoryMiB: 384}
}

func TestLoopbackConformsWithSizes(t *testing.T) {
	hypertest.ConformSize(t, func(t *testing.T) hypertest.SizeSubject {
		ends := make(chan *hypertest.GuestEnd, 1)
		var end *hypertest.GuestEnd
		await := func(ctx context.Context, wanted func(hypervisor.Size) bool) error {
			if end == nil {
				end = <-ends
			}
			return end.AwaitSize(ctx, wanted)
		}
		return hypertest.SizeSubject{
			Subject: hypertest.Subject{
				Hypervisor: &hypertest.Loopback{Guest: func(ctx context.Context, g *hypertest.GuestEnd) error {
					ends <- g
					return guest(ctx, g)
				}},
				Config: sizeConfig(t), Port: stream.Port, Greet: offer,
			},
			Online: func(ctx context.Context, _ hypervisor.VM, n int) error {
				return await(ctx, func(s hypervisor.Size) bool { return s.VCPUs >= n })
			},
			Await: func(ctx context.Context, _ hypervisor.VM, atLeast, atMost int) error {
				return await(ctx, func(s hypervisor.Size) bool { return s.MemoryMiB >= atLeast && s.MemoryMiB <= atMost })
			},
		}
	})
}

func TestLoopbackComesToWhatItIsToldTo(t *testing.T) {
	short := errors.New("no more")
	partly := hypervisor.Size{VCPUs: 2, MemoryMiB: 128}
	ends := make(chan *hypertest.GuestEnd, 1)
	l := &hypertest.Loopback{
		Guest: func(ctx context.Context, g *hypertest.GuestEnd) error {
			ends <- g
			return guest(ctx, g)
		},
		Resize: func(hypervisor.Size) (hypervisor.Size, error) { return partly, short },
	}
	vm, err := l.Start(t.Context(), sizeConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Stop(t.Context()) //nolint:errcheck // nothing to stop
	got, err := vm.(hypervisor.Resizer).Resize(t.Context(), hypervisor.Size{VCPUs: 3, MemoryMiB: 320})
	if !errors.Is(err, short) || got != partly {
		t.Errorf("Resize: %+v, %v; want %+v and %v", got, err, partly, short)
	}
	if err := vm.(hypervisor.Pauser).Pause(t.Context()); err != nil {
		t.Error(err)
	}
	if g := <-ends; g.Size() != partly || !g.Paused() || g.Memory() != partly.MemoryMiB {
		t.Errorf("the guest sees %+v, %d MiB, paused %v", g.Size(), g.Memory(), g.Paused())
	}
}
