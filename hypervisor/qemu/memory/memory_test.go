package memory

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
)

// A fakeQEMU has a guest that comes to what comes returns; what was asked of it is in
// log.
type fakeQEMU struct {
	memory *Memory
	log    []string
	size   int64 // of the device
	actual int64 // of the balloon
	// comes is what the guest makes of a request, in bytes, and whether QEMU tells of
	// it; nil: all of it.
	comes func(bytes int64) (int64, bool)
	fail  map[string]error
}

func (f *fakeQEMU) Execute(_ context.Context, cmd string, args, result any) error {
	if err := f.fail[cmd]; err != nil {
		return err
	}
	comes := func(at *int64, bytes int64, event, field string) {
		tell := true
		if f.comes != nil {
			bytes, tell = f.comes(bytes)
		}
		if *at == bytes {
			return
		}
		*at = bytes
		if tell {
			f.memory.Event(qmp.Event{Name: event, Data: json.RawMessage(fmt.Sprintf(`{"id": "mem", %q: %d}`, field, bytes))})
		}
	}
	var answer any
	switch cmd {
	case "object-add":
		a := args.(map[string]any)
		f.log = append(f.log, fmt.Sprintf("memory %d reserve=%v", a["size"].(int64)>>20, a["reserve"]))
	case "object-del":
		f.log = append(f.log, "no memory")
	case "device_add":
		bytes := args.(map[string]any)["requested-size"].(int64)
		f.log = append(f.log, fmt.Sprintf("device %d", bytes>>20))
		comes(&f.size, bytes, "MEMORY_DEVICE_SIZE_CHANGE", "size")
	case "qom-set":
		bytes := args.(map[string]any)["value"].(int64)
		f.log = append(f.log, fmt.Sprintf("request %d", bytes>>20))
		comes(&f.size, bytes, "MEMORY_DEVICE_SIZE_CHANGE", "size")
	case "balloon":
		bytes := args.(map[string]int64)["value"]
		f.log = append(f.log, fmt.Sprintf("balloon %d", bytes>>20))
		comes(&f.actual, bytes, "BALLOON_CHANGE", "actual")
	case "query-memory-devices":
		answer = []any{map[string]any{"data": map[string]any{"id": "mem", "size": f.size}}}
	case "query-balloon":
		answer = map[string]int64{"actual": f.actual}
	}
	if result == nil {
		return nil
	}
	text, err := json.Marshal(answer)
	return errors.Join(err, json.Unmarshal(text, result))
}

func newFake(boot, most int) *fakeQEMU {
	f := &fakeQEMU{actual: int64(boot) << 20}
	f.memory = New(f, boot, most, nil, Place{}, make(chan struct{}))
	return f
}

func (f *fakeQEMU) resize(t *testing.T, want, got int, log ...string) {
	t.Helper()
	f.log = nil
	if err := f.memory.Resize(t.Context(), want); err != nil || f.memory.MiB() != got || !slices.Equal(f.log, log) {
		t.Errorf("Resize to %d: %v, %d MiB, QEMU was told %q; want %d and %q", want, err, f.memory.MiB(), f.log, got, log)
	}
}

func TestTheDeviceIsPluggedOnce(t *testing.T) {
	f := newFake(256, 1000)
	f.resize(t, 256, 256)
	f.resize(t, 511, 512, "memory 768 reserve=false", "device 256")
	f.resize(t, 1000, 1000, "request 744")
	f.resize(t, 1000, 1000)
	f.resize(t, 0, 256, "request 0")
	if err := f.memory.Resize(t.Context(), 1001); !errdefs.IsInvalidArgument(err) || f.memory.MiB() != 256 {
		t.Errorf("Resize to more than there is room for: %v", err)
	}
}

func TestRoom(t *testing.T) {
	for _, c := range []struct{ boot, most, want int }{
		{256, 0, 0}, {256, 256, 0}, {256, 257, 128}, {256, 384, 128}, {256, 385, 256},
	} {
		if got := Room(c.boot, c.most); got != c.want {
			t.Errorf("Room(%d, %d) = %d, want %d", c.boot, c.most, got, c.want)
		}
	}
}

func TestADeviceThatQEMURefusesLeavesNothing(t *testing.T) {
	f := newFake(256, 512)
	refused := &qmp.Error{Command: "device_add", Class: "GenericError", Desc: "no"}
	f.fail = map[string]error{"device_add": refused}
	if err := f.memory.Resize(t.Context(), 512); !errors.Is(err, refused) || !slices.Equal(f.log, []string{"memory 256 reserve=false", "no memory"}) {
		t.Errorf("Resize: %v, QEMU was told %q", err, f.log)
	}
	f.fail = nil
	f.resize(t, 512, 512, "memory 256 reserve=false", "device 256")
}

func TestAGuestThatGivesBackPart(t *testing.T) {
	f := newFake(256, 512)
	f.resize(t, 512, 512, "memory 256 reserve=false", "device 256")
	f.comes = func(bytes int64) (int64, bool) { return max(bytes, 100<<20), true }
	f.log = nil
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	err := f.memory.Resize(ctx, 256)
	// It stays with the rest.
	if !errors.Is(err, context.DeadlineExceeded) || f.memory.MiB() != 356 || !slices.Equal(f.log, []string{"request 0", "request 100"}) {
		t.Errorf("Resize: %v, %d MiB, QEMU was told %q", err, f.memory.MiB(), f.log)
	}
}

func TestBalloonIsOfWhatWasBooted(t *testing.T) {
	f := newFake(256, 512)
	f.resize(t, 384, 384, "memory 256 reserve=false", "device 128")
	for _, c := range []struct{ want, got, told int }{{300, 300, 172}, {1000, 384, 256}, {192, 192, 64}} {
		f.log = nil
		got, err := f.memory.SetBalloon(t.Context(), c.want)
		if err != nil || got != c.got || !slices.Equal(f.log, []string{fmt.Sprintf("balloon %d", c.told)}) {
			t.Errorf("SetBalloon(%d): %d, %v, QEMU was told %q", c.want, got, err, f.log)
		}
	}
	if got, err := f.memory.SetBalloon(t.Context(), 191); !errdefs.IsInvalidArgument(err) || got != 192 {
		t.Errorf("SetBalloon below the least: %d, %v", got, err)
	}
	// What the guest comes to without a word is asked for.
	f.comes = func(int64) (int64, bool) { return 200 << 20, false }
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if got, err := f.memory.SetBalloon(ctx, 384); err != nil || got != 328 {
		t.Errorf("SetBalloon: %d, %v; want what the guest has come to", got, err)
	}
}
