// Package memory is the memory of a running QEMU beyond what it was booted with, by
// virtio-mem, and what its guest gives back of it, by virtio-balloon.
package memory

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
)

const (
	// stall is how long a guest may be silent before it is taken to have done what it
	// can: a busy host's takes some seconds to move what is in 128 MiB. QEMU holds events
	// of either device back for a second, and Linux tries again what it could not do
	// after 50 s (virtio_mem.c, VIRTIO_MEM_RETRY_TIMER_MIN_MS).
	stall = 15 * time.Second
	// settleTimeout bounds what is left to do once a caller has given up.
	settleTimeout = 5 * time.Second
	// Least is what the balloon leaves a guest, in MiB: what a VM is booted with at
	// least.
	Least = 64
	// guestBlockMiB is what Linux takes memory in by: it uses no part of a block that
	// the device does not have whole (memory_block_size_bytes, 128 MiB on x86 below
	// 64 GiB).
	guestBlockMiB = 128
	// granuleMiB is virtio-mem's own block: a huge page.
	granuleMiB = 2

	device  = "mem"
	backend = "plugram"
	// Balloon is the id of the balloon's device, which is there from the start.
	Balloon = "balloon"
)

// monitor is QEMU, asked over QMP.
type monitor interface {
	Execute(ctx context.Context, cmd string, args, result any) error
}

// A Place is where the device for memory is plugged.
type Place struct{ Bus, Addr string }

// Memory is that of one VM. Its methods are safe for concurrent use, but Resize and
// Balloon are for one caller at a time.
type Memory struct {
	monitor   monitor
	boot, max int // MiB
	node      *int
	place     Place
	ended     <-chan struct{}

	mu      sync.Mutex
	plugged int64 // bytes that the guest has of the device
	balloon int64 // bytes of what it was booted with that the balloon leaves
	changed chan struct{}
	device  bool // the device was plugged; for the one caller
}

// New returns the memory of a VM booted with boot MiB that may get most, bound to a node of
// the host if that is not nil. ended is closed when the VM has ended.
func New(m monitor, boot, most int, node *int, place Place, ended <-chan struct{}) *Memory {
	return &Memory{
		monitor: m, boot: boot, max: max(boot, most), node: node, place: place, ended: ended,
		balloon: int64(boot) << 20, changed: make(chan struct{}),
	}
}

// Room is what a device that takes a VM from boot to at least most has, in MiB: whole blocks
// of the guest's.
func Room(boot, most int) int {
	if most <= boot {
		return 0
	}
	return roundUp(most-boot, guestBlockMiB)
}

func roundUp(n, unit int) int { return (n + unit - 1) / unit * unit }

// Backend describes a piece of memory of the guest's, for -object and object-add alike.
func Backend(id string, mib int, node *int) map[string]any {
	b := map[string]any{"qom-type": "memory-backend-memfd", "id": id, "share": true, "size": int64(mib) << 20}
	if node != nil {
		b["host-nodes"], b["policy"] = []int{*node}, "bind"
	}
	return b
}

// MiB is what the VM has, whatever the balloon holds of it.
func (m *Memory) MiB() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot + int(m.plugged>>20)
}

// Max is what it can have, in MiB.
func (m *Memory) Max() int { return m.max }

// Resize has the guest plug or unplug memory until it has want MiB, or what it was
// booted with, rounded up to what the device deals in. Where it comes no further for a
// while, or ctx ends, it stays with what it has, and the error says what is missing.
func (m *Memory) Resize(ctx context.Context, want int) error {
	want = max(want, m.boot)
	if want > m.max {
		return fmt.Errorf("%d MiB of memory: the VM has room for %d: %w", want, m.max, errdefs.ErrInvalidArgument)
	}
	requested := int64(roundUp(want-m.boot, granuleMiB)) << 20
	if m.bytes() == requested {
		return nil
	}
	err := m.request(ctx, requested)
	if err == nil {
		err = m.await(ctx, func() bool { return m.plugged == requested })
	}
	if err == nil {
		return nil
	}
	// It stays with what is told here, and does not go on in its own time.
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	err = errors.Join(err, m.settle(undo))
	if errors.Is(err, errStalled) && m.bytes() == requested { // its last event was lost
		return nil
	}
	return fmt.Errorf("%d MiB of memory: the guest has come to %d: %w", want, m.MiB(), err)
}

func (m *Memory) bytes() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.plugged
}

// request tells the guest how much of the device it shall have. The device is plugged
// the first time: a VM that is never resized does without.
func (m *Memory) request(ctx context.Context, bytes int64) error {
	if m.device {
		return m.monitor.Execute(ctx, "qom-set", map[string]any{
			"path": "/machine/peripheral/" + device, "property": "requested-size", "value": bytes,
		}, nil)
	}
	ram := Backend(backend, Room(m.boot, m.max), m.node)
	ram["reserve"] = false // what the guest does not have costs nothing
	if err := m.monitor.Execute(ctx, "object-add", ram, nil); err != nil {
		return err
	}
	err := m.monitor.Execute(ctx, "device_add", map[string]any{
		"driver": "virtio-mem-pci", "id": device, "memdev": backend, "requested-size": bytes,
		"bus": m.place.Bus, "addr": m.place.Addr,
	}, nil)
	var refused *qmp.Error
	if err == nil || !errors.As(err, &refused) { // QEMU may yet do what it was told
		m.device = true
		return err
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	return errors.Join(err, m.monitor.Execute(undo, "object-del", map[string]string{"id": backend}, nil))
}

// settle has the guest stay with what it has.
func (m *Memory) settle(ctx context.Context) error {
	if !m.device {
		return nil
	}
	if err := m.look(ctx); err != nil {
		return err
	}
	if err := m.request(ctx, m.bytes()); err != nil {
		return err
	}
	return m.look(ctx)
}

// look asks QEMU for what the guest has.
func (m *Memory) look(ctx context.Context) error {
	var devices []struct {
		Data struct {
			ID   string `json:"id"`
			Size int64  `json:"size"`
		} `json:"data"`
	}
	if err := m.monitor.Execute(ctx, "query-memory-devices", nil, &devices); err != nil {
		return err
	}
	for _, d := range devices {
		if d.Data.ID == device {
			m.note(&m.plugged, d.Data.Size)
		}
	}
	return nil
}

// SetBalloon asks the guest to make do with mib of what the VM has, and returns what it has
// come to.
func (m *Memory) SetBalloon(ctx context.Context, mib int) (int, error) {
	total := m.MiB()
	target := int64(m.boot-max(0, total-mib)) << 20
	if target < Least<<20 {
		return m.left(), fmt.Errorf("%d MiB of %d: the guest keeps at least %d of the %d that it was booted with: %w",
			mib, total, Least, m.boot, errdefs.ErrInvalidArgument)
	}
	err := m.monitor.Execute(ctx, "balloon", map[string]int64{"value": target}, nil)
	if err == nil {
		err = m.await(ctx, func() bool { return m.balloon == target })
	}
	if err != nil && !errors.Is(err, errStalled) && ctx.Err() == nil {
		return m.left(), fmt.Errorf("set the balloon: %w", err)
	}
	if err == nil {
		return m.left(), nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	var now struct {
		Actual int64 `json:"actual"`
	}
	if err := m.monitor.Execute(undo, "query-balloon", nil, &now); err != nil {
		return m.left(), fmt.Errorf("ask the balloon: %w", err)
	}
	m.note(&m.balloon, now.Actual)
	return m.left(), nil
}

// left is what the balloon leaves of what the VM has, in MiB.
func (m *Memory) left() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int((m.plugged + m.balloon) >> 20)
}

// errStalled is how waiting for a guest ends that comes no further.
var errStalled = fmt.Errorf("it has come no further for %v: %w", stall, errdefs.ErrFailedPrecondition)

// await waits until there is what is wanted, asked under the lock.
func (m *Memory) await(ctx context.Context, there func() bool) error {
	for {
		m.mu.Lock()
		done, changed := there(), m.changed
		m.mu.Unlock()
		if done {
			return nil
		}
		silent := time.NewTimer(stall)
		select {
		case <-changed:
		case <-silent.C:
			return errStalled
		case <-ctx.Done():
			silent.Stop()
			return context.Cause(ctx)
		case <-m.ended:
			silent.Stop()
			return errdefs.ErrUnavailable
		}
		silent.Stop()
	}
}

// Event takes QEMU's events of memory.
func (m *Memory) Event(e qmp.Event) {
	var data struct {
		ID     string `json:"id"`
		Size   int64  `json:"size"`
		Actual int64  `json:"actual"`
	}
	if json.Unmarshal(e.Data, &data) != nil {
		return
	}
	switch {
	case e.Name == "MEMORY_DEVICE_SIZE_CHANGE" && data.ID == device:
		m.note(&m.plugged, data.Size)
	case e.Name == "BALLOON_CHANGE":
		m.note(&m.balloon, data.Actual)
	}
}

// note keeps a size and wakes those who wait.
func (m *Memory) note(size *int64, bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	*size = bytes
	close(m.changed)
	m.changed = make(chan struct{})
}
