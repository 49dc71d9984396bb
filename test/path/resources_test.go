package path_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
)

const mebibyte = int64(1) << 20

func limited(memory int64) *specs.LinuxResources {
	return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}}
}

// update asks for other limits of the task.
func (h *host) update(r *specs.LinuxResources) error {
	h.t.Helper()
	raw, err := json.Marshal(r)
	if err != nil {
		h.t.Fatal(err)
	}
	_, err = h.Update(h.t.Context(), &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{Value: raw}})
	return errgrpc.ToNative(err)
}

func (h *host) status() task.Status {
	h.t.Helper()
	st, err := h.State(h.t.Context(), &taskapi.StateRequest{ID: "c"})
	if err != nil {
		h.t.Fatal(err)
	}
	return st.Status
}

// The VM is as large as the container asks for, grows with an update and shrinks again;
// what is refused changes neither the VM nor the container.
func TestTheVMChangesWithTheContainersLimits(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, func(h *host, _ *hypertest.Loopback) {
		h.config.Hypervisor.MaxMemoryMiB = 1024
		h.resources = limited(256 * mebibyte)
	})
	h.run(nil, false)
	vm := <-h.vm
	boot := vm.Size()
	if boot.VCPUs != 1 || boot.MemoryMiB <= 256 || boot.MemoryMiB > 400 {
		t.Fatalf("for 256 MiB the VM has %+v", boot)
	}
	if err := h.update(limited(512 * mebibyte)); err != nil {
		t.Fatal(err)
	}
	grown := vm.Size()
	if grown.MemoryMiB < boot.MemoryMiB+256 || *h.runtime.Resources("c").Memory.Limit != 512*mebibyte {
		t.Errorf("for 512 MiB the VM has %+v, the container %+v", grown, h.runtime.Resources("c"))
	}
	err := h.update(limited(2048 * mebibyte))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "max_memory_mib") {
		t.Errorf("above the maximum: %v", err)
	}
	if now := vm.Size(); now != grown || *h.runtime.Resources("c").Memory.Limit != 512*mebibyte {
		t.Errorf("after a refusal the VM has %+v, the container %+v", now, h.runtime.Resources("c"))
	}
	err = h.update(&specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"mlx5": {}}})
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "rdma") {
		t.Errorf("what a guest cannot have: %v", err)
	}
	if err := h.update(limited(128 * mebibyte)); err != nil {
		t.Fatal(err)
	}
	if now := vm.Size(); now != boot {
		t.Errorf("for 128 MiB the VM has %+v, want what it was booted with, %+v", now, boot)
	}
}

// A VM that cannot grow leaves all as it was.
func TestAVMThatCannotGrow(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, func(h *host, l *hypertest.Loopback) {
		h.resources = limited(128 * mebibyte)
		l.Resize = func(want hypervisor.Size) (hypervisor.Size, error) {
			if want.MemoryMiB > 512 {
				return hypervisor.Size{VCPUs: 1, MemoryMiB: 300}, errdefs.ErrUnavailable
			}
			return want, nil
		}
	})
	h.run(nil, false)
	vm := <-h.vm
	boot := vm.Size()
	if err := h.update(limited(700 * mebibyte)); err == nil || !strings.Contains(err.Error(), "resize the VM") {
		t.Errorf("%v", err)
	}
	if now := vm.Size(); now != boot || h.runtime.Resources("c") != nil {
		t.Errorf("the VM has %+v, want %+v; the container was told %+v", now, boot, h.runtime.Resources("c"))
	}
}

func TestStatsPauseAndResume(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	ctx := t.Context()
	pids := func() uint64 {
		t.Helper()
		resp, err := h.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
		if err != nil {
			t.Fatal(err)
		}
		m, err := typeurl.UnmarshalAny(resp.Stats)
		if err != nil {
			t.Fatal(err)
		}
		return m.(*stats.Metrics).Pids.Current
	}
	if n := pids(); n != 1 {
		t.Errorf("%d processes", n)
	}
	// A container stands still, and the VM goes on.
	if _, err := h.Pause(ctx, &taskapi.PauseRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if s := h.status(); s != task.Status_PAUSED || h.sandbox.Paused() {
		t.Errorf("the container is %s, the VM paused: %v", s, h.sandbox.Paused())
	}
	_, err := h.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: []byte(`{"args":["true"],"cwd":"/"}`)}})
	if err = errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "resume it first") {
		t.Errorf("exec: %v", err)
	}
	if _, err := h.Resume(ctx, &taskapi.ResumeRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if s := h.status(); s != task.Status_RUNNING {
		t.Errorf("the container is %s", s)
	}
	// The sandbox stands still as a whole, and tells what it did last.
	if err := h.sandbox.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if s := h.status(); s != task.Status_PAUSED || !h.sandbox.Paused() || pids() != 1 {
		t.Errorf("the container is %s, the VM paused: %v", s, h.sandbox.Paused())
	}
	if list, err := h.Pids(ctx, &taskapi.PidsRequest{ID: "c"}); err != nil || len(list.Processes) != 1 {
		t.Errorf("processes of a paused sandbox: %v, %v", list, err)
	}
	if err := h.sandbox.Pause(ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("pause again: %v", err)
	}
	if err := h.update(limited(64 * mebibyte)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "paused") {
		t.Errorf("update while paused: %v", err)
	}
	if _, err := h.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGTERM)}); err == nil || !strings.Contains(err.Error(), "paused") {
		t.Errorf("SIGTERM while paused: %v", err)
	}
	// A SIGKILL is for certain.
	if _, err := h.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGKILL)}); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 137 || h.sandbox.Paused() {
		t.Errorf("exit status %d; the VM is paused: %v", got, h.sandbox.Paused())
	}
	h.remove()
	h.expectEvents("create", "start", "paused", "resumed", "exit c 137", "delete")
}

// A paused sandbox can be stopped, and at once: its guest is not asked.
func TestAPausedSandboxStops(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	if err := h.sandbox.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), h.config.Runtime.StopTimeout.Duration)
	defer cancel()
	if err := h.sandbox.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 137 {
		t.Errorf("exit status %d", got)
	}
	h.remove()
}

// Memory can be taken back from a VM as it was booted, and from one that has grown.
func TestReclaim(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, func(h *host, _ *hypertest.Loopback) { h.resources = limited(128 * mebibyte) })
	h.run(nil, false)
	vm := <-h.vm
	for _, mib := range []int64{128, 1024} {
		if err := h.update(limited(mib * mebibyte)); err != nil {
			t.Fatal(err)
		}
		size := vm.Size()
		if _, _, err := h.sandbox.Reclaim(t.Context()); err != nil || vm.Size() != size {
			t.Errorf("of %+v: %v; the VM has %+v", size, err, vm.Size())
		}
	}
}
