// Package vcpu is the vCPUs of a running QEMU: they are plugged, unplugged, and found
// among its threads.
package vcpu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
)

// monitor is QEMU, asked over QMP.
type monitor interface {
	Execute(ctx context.Context, cmd string, args, result any) error
}

// CPUs are those of one VM. The ones that it was booted with stay; further ones are
// plugged in the order of their numbers and unplugged in the reverse one:
//
//	Resize ── device_add ──> plugged ── device_del ──> asked ──> gone
//	                            ^                        │
//	                            └─ the guest refuses ────┘
//
// Under TCG none is ever plugged: all are there from the boot, those above Count parked,
// which is to say that the guest has not taken them into use. QEMU 7.2 ends itself where
// a vCPU comes when its buffer of translated code is full (tcg_region_initial_alloc), and
// writes beyond its translators where one comes that was there before
// (tcg_register_thread).
//
// Its methods are safe for concurrent use, but Resize is for one caller at a time.
type CPUs struct {
	monitor   monitor
	boot, max int
	parks     bool
	ended     <-chan struct{}

	mu      sync.Mutex
	plugged map[string]*cpu // by QEMU's id
	used    int             // how many are not parked, if it parks
}

// A cpu was plugged.
type cpu struct {
	gone    chan struct{} // closed when the guest has let go of it
	refused chan string   // room for one: the guest will not
}

// New returns the CPUs of a VM that was booted with boot of them and has room for
// most. parks tells that it runs under TCG, where all are there; ended is closed when the
// VM has ended.
func New(m monitor, boot, most int, parks bool, ended <-chan struct{}) *CPUs {
	return &CPUs{monitor: m, boot: boot, max: max(boot, most), parks: parks, used: boot, ended: ended, plugged: map[string]*cpu{}}
}

// Count is how many there are.
func (c *CPUs) Count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.parks {
		return c.used
	}
	return c.boot + len(c.plugged)
}

// Max is how many there can be.
func (c *CPUs) Max() int { return c.max }

// id is QEMU's for the vCPU of that number, as it counts them, from 0.
func id(number int) string { return fmt.Sprintf("cpu%d", number) }

// Resize plugs or unplugs vCPUs until there are want, or as many as there were at the
// boot. Unplugging waits for the guest, until ctx ends.
func (c *CPUs) Resize(ctx context.Context, want int) error {
	want = max(want, c.boot)
	if want > c.max {
		return fmt.Errorf("%d vCPUs: the VM has room for %d: %w", want, c.max, errdefs.ErrInvalidArgument)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if c.parks {
		return c.use(want)
	}
	switch count := c.Count(); {
	case count < want:
		return c.grow(ctx, want)
	case count == want:
		return nil
	}
	for number := c.max - 1; number >= want; number-- {
		if err := c.unplug(ctx, number); err != nil {
			return fmt.Errorf("unplug vCPU %d: %w", number, err)
		}
	}
	return nil
}

// use parks all but the first want.
func (c *CPUs) use(want int) error {
	select {
	case <-c.ended:
		return errdefs.ErrUnavailable
	default:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used = want
	return nil
}

// A place is where a vCPU can be, as QEMU tells.
type place struct {
	Driver string `json:"type"`
	Props  struct {
		Node   *int `json:"node-id,omitempty"`
		Socket int  `json:"socket-id"`
		Die    *int `json:"die-id,omitempty"`
		Core   int  `json:"core-id"`
		Thread int  `json:"thread-id"`
	} `json:"props"`
	Path string `json:"qom-path"` // empty where there is none
}

func (c *CPUs) grow(ctx context.Context, want int) error {
	var places []place
	if err := c.monitor.Execute(ctx, "query-hotpluggable-cpus", nil, &places); err != nil {
		return fmt.Errorf("plug a vCPU: %w", err)
	}
	// There is one socket and one thread of a core: the core is the number.
	slices.SortFunc(places, func(a, b place) int { return a.Props.Core - b.Props.Core })
	for number, p := range places {
		if number >= want {
			break
		}
		if p.Path != "" {
			continue
		}
		if err := c.plug(ctx, number, p); err != nil {
			return fmt.Errorf("plug vCPU %d: %w", number, err)
		}
	}
	if got := c.Count(); got < want {
		return fmt.Errorf("plug vCPUs: QEMU has room for %d, want %d: %w", got, want, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (c *CPUs) plug(ctx context.Context, number int, p place) error {
	c.mu.Lock()
	c.plugged[id(number)] = &cpu{gone: make(chan struct{}), refused: make(chan string, 1)}
	c.mu.Unlock()
	err := c.monitor.Execute(ctx, "device_add", map[string]any{
		"driver": p.Driver, "id": id(number),
		"socket-id": p.Props.Socket, "core-id": p.Props.Core, "thread-id": p.Props.Thread,
	}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) { // otherwise QEMU may yet do it
		c.lost(id(number))
	}
	return err
}

// unplug takes out one vCPU, if it was plugged.
func (c *CPUs) unplug(ctx context.Context, number int) error {
	c.mu.Lock()
	one := c.plugged[id(number)]
	c.mu.Unlock()
	if one == nil {
		return nil
	}
	select {
	case <-one.refused: // of an earlier time
	default:
	}
	err := c.monitor.Execute(ctx, "device_del", map[string]string{"id": id(number)}, nil)
	if errdefs.IsNotFound(err) { // never made
		c.lost(id(number))
		return nil
	}
	if err != nil {
		return err
	}
	select {
	case <-one.gone:
		return nil
	case why := <-one.refused:
		return fmt.Errorf("the guest keeps it (%s): take it offline there first: %w", why, errdefs.ErrFailedPrecondition)
	case <-c.ended:
		return errdefs.ErrUnavailable
	case <-ctx.Done():
		return fmt.Errorf("the guest has not let go of it: %w", context.Cause(ctx))
	}
}

// lost notes that a vCPU is no more.
func (c *CPUs) lost(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one := c.plugged[id]; one != nil {
		close(one.gone)
		delete(c.plugged, id)
	}
}

// What the guest answers by ACPI's _OST (ACPI 6.4, 6.3.5): to a request to eject, in
// progress, or done.
const (
	ostEject      = 3
	ostInProgress = 0x84
	ostSuccess    = 0
)

// Event takes QEMU's events of vCPUs.
func (c *CPUs) Event(e qmp.Event) {
	switch e.Name {
	case "DEVICE_DELETED":
		// Of a translated vCPU QEMU 7.2 tells that what is in it is gone, such as
		// its interrupt controller, and not that it is itself.
		var data struct {
			Path string `json:"path"`
		}
		rest, ok := "", false
		if json.Unmarshal(e.Data, &data) == nil {
			rest, ok = strings.CutPrefix(data.Path, "/machine/peripheral/")
		}
		if device, _, _ := strings.Cut(rest, "/"); ok {
			c.lost(device)
		}
	case "ACPI_DEVICE_OST":
		var data struct {
			Info struct {
				Device string `json:"device"`
				Source int    `json:"source"`
				Status int    `json:"status"`
			} `json:"info"`
		}
		if json.Unmarshal(e.Data, &data) != nil || data.Info.Source != ostEject ||
			data.Info.Status == ostSuccess || data.Info.Status == ostInProgress {
			return
		}
		c.refuse(data.Info.Device, fmt.Sprintf("ACPI status %#x", data.Info.Status))
	}
}

func (c *CPUs) refuse(id, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one := c.plugged[id]; one != nil {
		select {
		case one.refused <- why:
		default: // it has said so
		}
	}
}

// Threads returns the host's thread ids of the vCPUs of the QEMU that has that process
// id, by their numbers.
func (c *CPUs) Threads(ctx context.Context, pid int) (map[int]int, error) {
	var cpus []struct {
		Number int `json:"cpu-index"`
		Thread int `json:"thread-id"` // as its own pid namespace has it
	}
	if err := c.monitor.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return nil, fmt.Errorf("find the vCPUs' threads: %w", err)
	}
	host, err := hostThreads(pid)
	if err != nil {
		return nil, fmt.Errorf("find the vCPUs' threads: %w", err)
	}
	threads, count := map[int]int{}, c.Count()
	for _, one := range cpus {
		if one.Number >= count { // parked
			continue
		}
		tid, ok := host[one.Thread]
		if !ok {
			return nil, fmt.Errorf("find the vCPUs' threads: QEMU has no thread %d among %v: %w",
				one.Thread, slices.Sorted(maps.Keys(host)), errdefs.ErrNotFound)
		}
		threads[one.Number] = tid
	}
	return threads, nil
}
