package vcpu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
)

// A fakeQEMU has room for vCPUs; what was asked of it is in log.
type fakeQEMU struct {
	cpus    *CPUs
	present map[int]bool
	room    int
	log     []string
	// unplug is what becomes of a request to unplug; nil: the guest lets go at once.
	unplug func(id string)
	fail   error // of device_add
}

func (f *fakeQEMU) Execute(_ context.Context, cmd string, args, result any) error {
	switch cmd {
	case "query-hotpluggable-cpus":
		var places []map[string]any
		for n := f.room - 1; n >= 0; n-- { // as QEMU has them
			p := map[string]any{"type": "x-cpu", "props": map[string]int{"socket-id": 0, "core-id": n, "thread-id": 0}}
			if f.present[n] {
				p["qom-path"] = "/machine"
			}
			places = append(places, p)
		}
		text, err := json.Marshal(places)
		return errors.Join(err, json.Unmarshal(text, result))
	case "device_add":
		if f.fail != nil {
			return f.fail
		}
		a := args.(map[string]any)
		f.present[a["core-id"].(int)] = true
		f.log = append(f.log, fmt.Sprintf("add %v %v", a["driver"], a["id"]))
	case "device_del":
		id := args.(map[string]string)["id"]
		f.log = append(f.log, "del "+id)
		if f.unplug != nil {
			f.unplug(id)
			return nil
		}
		f.deleted(id)
	}
	return nil
}

// deleted tells as QEMU 7.2 does.
func (f *fakeQEMU) deleted(id string) {
	var n int
	if _, err := fmt.Sscanf(id, "cpu%d", &n); err == nil {
		f.present[n] = false
	}
	f.cpus.Event(qmp.Event{Name: "DEVICE_DELETED", Data: json.RawMessage(`{"path": "/machine/peripheral/` + id + `/lapic"}`)})
}

func newFake(boot, room int, parks bool) *fakeQEMU {
	f := &fakeQEMU{present: map[int]bool{}, room: room}
	for n := range boot {
		f.present[n] = true
	}
	f.cpus = New(f, boot, room, parks, make(chan struct{}))
	return f
}

func (f *fakeQEMU) resize(t *testing.T, want, count int, log ...string) {
	t.Helper()
	f.log = nil
	if err := f.cpus.Resize(t.Context(), want); err != nil || f.cpus.Count() != count || !slices.Equal(f.log, log) {
		t.Errorf("Resize to %d: %v, %d vCPUs, QEMU was told %q; want %d and %q", want, err, f.cpus.Count(), f.log, count, log)
	}
}

func TestTheLastIsUnpluggedFirst(t *testing.T) {
	f := newFake(2, 4, false)
	f.resize(t, 4, 4, "add x-cpu cpu2", "add x-cpu cpu3")
	f.resize(t, 4, 4)
	f.resize(t, 3, 3, "del cpu3")
	f.resize(t, 0, 2, "del cpu2")
	f.resize(t, 3, 3, "add x-cpu cpu2")
	if err := f.cpus.Resize(t.Context(), 5); !errdefs.IsInvalidArgument(err) || f.cpus.Count() != 3 {
		t.Errorf("Resize to more than there is room for: %v", err)
	}
}

func TestTranslatedCPUsAreParked(t *testing.T) {
	f := newFake(1, 4, true)
	f.resize(t, 3, 3)
	f.resize(t, 0, 1)
	f.resize(t, 4, 4)
	if err := f.cpus.Resize(t.Context(), 5); !errdefs.IsInvalidArgument(err) || f.cpus.Count() != 4 {
		t.Errorf("Resize to more than there is room for: %v", err)
	}
}

func TestAGuestThatKeepsAVCPU(t *testing.T) {
	f := newFake(1, 2, false)
	f.resize(t, 2, 2, "add x-cpu cpu1")
	ost := func(source, status int) {
		f.cpus.Event(qmp.Event{Name: "ACPI_DEVICE_OST", Data: json.RawMessage(
			fmt.Sprintf(`{"info": {"device": "cpu1", "source": %d, "status": %d}}`, source, status))})
	}
	f.unplug = func(string) { ost(1, 1); ost(3, 0x84); ost(3, 1) }
	for range 2 {
		err := f.cpus.Resize(t.Context(), 1)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "vCPU 1: the guest keeps it (ACPI status 0x1)") || f.cpus.Count() != 2 {
			t.Errorf("Resize: %v, %d vCPUs; want that the guest keeps it", err, f.cpus.Count())
		}
	}
	f.unplug = func(string) {}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := f.cpus.Resize(ctx, 1); !errors.Is(err, context.DeadlineExceeded) || f.cpus.Count() != 2 {
		t.Errorf("Resize of a guest that is silent: %v", err)
	}
	f.deleted("cpu1") // late
	if f.cpus.Count() != 1 {
		t.Errorf("%d vCPUs after the guest let go late, want 1", f.cpus.Count())
	}
	f.unplug = nil
	f.resize(t, 2, 2, "add x-cpu cpu1")
}

func TestWhatQEMURefusesIsNotThere(t *testing.T) {
	f := newFake(1, 2, false)
	f.fail = &qmp.Error{Command: "device_add", Class: "GenericError", Desc: "no"}
	if err := f.cpus.Resize(t.Context(), 2); !errors.Is(err, f.fail) || f.cpus.Count() != 1 {
		t.Errorf("Resize: %v, %d vCPUs", err, f.cpus.Count())
	}
	f.fail = nil
	f.resize(t, 2, 2, "add x-cpu cpu1")
}

func TestEventsOfOthersAreIgnored(t *testing.T) {
	f := newFake(1, 2, false)
	f.resize(t, 2, 2, "add x-cpu cpu1")
	for _, data := range []string{`{"path": "/machine/peripheral/nic-cpu1"}`, `{"path": "cpu1"}`, `{}`, `[`, ``} {
		for _, name := range []string{"DEVICE_DELETED", "ACPI_DEVICE_OST", "RESET"} {
			f.cpus.Event(qmp.Event{Name: name, Data: json.RawMessage(data)})
		}
	}
	if f.cpus.Count() != 2 {
		t.Errorf("%d vCPUs, want 2", f.cpus.Count())
	}
}

func TestNamespacePIDs(t *testing.T) {
	for status, want := range map[string][2]int{
		"Name:\tx\nNSpid:\t4711\t3\nNSpgid:\t1\n": {4711, 3},
		"NSpid:\t12\n":      {12, 12},
		"NSpid:\t5\t4\t3\n": {5, 3},
	} {
		if outer, inner, err := namespacePIDs(status); err != nil || [2]int{outer, inner} != want {
			t.Errorf("%q: %d, %d, %v; want %v", status, outer, inner, err, want)
		}
	}
	for _, status := range []string{"", "Name:\tx\n", "NSpid:\n", "NSpid:\ta\n"} {
		if _, _, err := namespacePIDs(status); err == nil {
			t.Errorf("%q was taken", status)
		}
	}
	threads, err := hostThreads(os.Getpid())
	if err != nil || threads[os.Getpid()] != os.Getpid() {
		t.Errorf("the threads of this process: %v, %v", threads, err)
	}
}
