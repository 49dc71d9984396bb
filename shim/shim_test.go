package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	api2 "github.com/containerd/containerd/api/runtime/task/v2"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/shim/task/tasktest"
)

// One set of message types serves both versions of the API.
func TestVersionsAreAlikeOnTheWire(t *testing.T) {
	text := func(s string) string {
		return strings.NewReplacer("task.v2", "task", "task.v3", "task", "task/v2", "task", "task/v3", "task").Replace(s)
	}
	v2 := text(protodesc.ToFileDescriptorProto(api2.File_runtime_task_v2_shim_proto).String())
	v3 := text(protodesc.ToFileDescriptorProto(api.File_runtime_task_v3_shim_proto).String())
	if v2 != v3 {
		t.Error(cmp.Diff(v2, v3))
	}
}

func TestLife(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	v2 := api2.NewTTRPCTaskClient(h.conn) // both versions see the same task
	c := h.create("c")
	status := func(exec string) *api2.StateResponse {
		t.Helper()
		st, err := v2.State(ctx, &api2.StateRequest{ID: "c", ExecID: exec})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := status(""); st.Status != taskapi.Status_CREATED || st.Pid != fakePID || st.Bundle != h.bundle || st.ID != "c" {
		t.Errorf("created: %v", st)
	}
	if got, err := os.ReadFile(filepath.Join(h.bundle, bootstrap.InitPIDFile)); err != nil || string(got) != fmt.Sprint(fakePID) {
		t.Errorf("the pid for delete: %q, %v", got, err)
	}
	if r, err := h.Start(ctx, &api.StartRequest{ID: "c"}); err != nil || r.Pid != fakePID {
		t.Fatalf("start: %v, %v", r, err)
	}
	if st := status(""); st.Status != taskapi.Status_RUNNING {
		t.Errorf("running: %v", st)
	}
	if _, err := h.Exec(ctx, &api.ExecProcessRequest{ID: "c", ExecID: "e", Terminal: true, Spec: &anypb.Any{Value: []byte(`{"args":["sh"]}`)}}); err != nil {
		t.Fatal(err)
	}
	if st := status("e"); st.Status != taskapi.Status_CREATED || st.ID != "e" || !st.Terminal {
		t.Errorf("exec: %v", st)
	}
	if _, err := h.Start(ctx, &api.StartRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.ResizePty(ctx, &api.ResizePtyRequest{ID: "c", ExecID: "e", Width: 80, Height: 24}); err != nil || c.Added("e").Size() != [2]uint32{80, 24} {
		t.Errorf("resize: %v, %v", err, c.Added("e").Size())
	}
	ps, err := h.Pids(ctx, &api.PidsRequest{ID: "c"})
	if err != nil || len(ps.Processes) != 2 || ps.Processes[0].Info != nil || ps.Processes[1].Info.GetTypeUrl() != "containerd.runc.v1.ProcessDetails" {
		t.Errorf("pids: %v, %v", ps, err)
	}
	c.Added("e").ExitWith(3)
	if w := h.wait("c", "e"); w.ExitStatus != 3 {
		t.Errorf("wait for the exec: %v", w)
	}
	if d, err := h.Delete(ctx, &api.DeleteRequest{ID: "c", ExecID: "e"}); err != nil || d.ExitStatus != 3 {
		t.Errorf("delete the exec: %v, %v", d, err)
	}
	h.sandbox.ooms <- "c"
	h.sandbox.ooms <- "c" // the first has been told now
	if _, err := h.Shutdown(ctx, &api.ShutdownRequest{ID: "c"}); err != nil || h.sandbox.stopped {
		t.Errorf("shutdown with a task: %v, stopped %v", err, h.sandbox.isStopped())
	}
	c.Main().ExitWith(5)
	if w := h.wait("c", ""); w.ExitStatus != 5 || w.ExitedAt.AsTime().Unix() != 1e9 {
		t.Errorf("wait: %v", w)
	}
	if st := status(""); st.Status != taskapi.Status_STOPPED || st.ExitStatus != 5 {
		t.Errorf("stopped: %v", st)
	}
	if d, err := v2.Delete(ctx, &api2.DeleteRequest{ID: "c"}); err != nil || d.ExitStatus != 5 || d.Pid != fakePID {
		t.Errorf("delete: %v, %v", d, err)
	}
	if _, err := h.Connect(ctx, &api.ConnectRequest{ID: "c"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("connect without a task: %v, want NotFound", err)
	}
	h.shutdown("c")
	if !h.sandbox.isStopped() {
		t.Error("shutdown without a task left the sandbox running")
	}
	got := slices.DeleteFunc(h.journal.Words(), func(w string) bool { return w == "oom c" }) // comes when it comes
	want := []string{"create c", "start c", "added e", "start e", "exit e 3", "exit c 5", "delete c"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestErrors(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	h.create("created")
	h.run("running")
	h.run("stopped").Main().ExitWith(0)
	h.wait("stopped", "")
	spec := &anypb.Any{Value: []byte(`{}`)}
	for _, id := range []string{"e", "failing"} {
		if _, err := h.Exec(ctx, &api.ExecProcessRequest{ID: "running", ExecID: id, Spec: spec}); err != nil {
			t.Fatal(err)
		}
	}
	h.sandbox.container("running").Added("failing").StartErr = errors.New("no such file\nin PATH")
	for name, tt := range map[string]struct {
		call func() error
		is   error
	}{
		"create again": {func() error {
			_, err := h.Create(ctx, &api.CreateTaskRequest{ID: "running", Bundle: h.bundle})
			return err
		}, errdefs.ErrAlreadyExists},
		"create from a checkpoint": {func() error {
			_, err := h.Create(ctx, &api.CreateTaskRequest{ID: "x", Bundle: h.bundle, Checkpoint: "/c"})
			return err
		}, errdefs.ErrFailedPrecondition},
		"start again":  {func() error { _, err := h.Start(ctx, &api.StartRequest{ID: "running"}); return err }, errdefs.ErrFailedPrecondition},
		"unknown task": {func() error { _, err := h.State(ctx, &api.StateRequest{ID: "x"}); return err }, errdefs.ErrNotFound},
		"unknown exec": {func() error {
			_, err := h.Wait(ctx, &api.WaitRequest{ID: "running", ExecID: "x"})
			return err
		}, errdefs.ErrNotFound},
		"exec again": {func() error {
			_, err := h.Exec(ctx, &api.ExecProcessRequest{ID: "running", ExecID: "e", Spec: spec})
			return err
		}, errdefs.ErrAlreadyExists},
		"exec of what is no process": {func() error {
			_, err := h.Exec(ctx, &api.ExecProcessRequest{ID: "running", ExecID: "e2", Spec: &anypb.Any{Value: []byte("no")}})
			return err
		}, errdefs.ErrInvalidArgument},
		"exec into unknown streams": {func() error {
			_, err := h.Exec(ctx, &api.ExecProcessRequest{ID: "running", ExecID: "e3", Spec: spec, Stdout: "syslog://x"})
			return err
		}, errdefs.ErrNotImplemented},
		"start an exec that cannot": {func() error {
			_, err := h.Start(ctx, &api.StartRequest{ID: "running", ExecID: "failing"})
			return err
		}, errdefs.ErrUnknown},
		"delete while running":  {func() error { _, err := h.Delete(ctx, &api.DeleteRequest{ID: "running"}); return err }, errdefs.ErrFailedPrecondition},
		"kill what has exited":  {func() error { _, err := h.Kill(ctx, &api.KillRequest{ID: "stopped", Signal: 9}); return err }, errdefs.ErrNotFound},
		"pause what has exited": {func() error { _, err := h.Pause(ctx, &api.PauseRequest{ID: "stopped"}); return err }, errdefs.ErrFailedPrecondition},
		"a checkpoint": {func() error {
			_, err := h.Checkpoint(ctx, &api.CheckpointTaskRequest{ID: "running"})
			return err
		}, errdefs.ErrNotImplemented},
	} {
		err := tt.call()
		if err == nil || !errors.Is(errgrpc.ToNative(err), tt.is) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want one line of class %v", name, err, tt.is)
		}
	}
	if w := h.wait("running", "failing"); w.ExitStatus != 255 {
		t.Errorf("an exec that could not be started ended with %v", w)
	}
	for _, id := range []string{"e", "failing"} { // one never started, one that could not
		if _, err := h.Delete(ctx, &api.DeleteRequest{ID: "running", ExecID: id}); err != nil {
			t.Errorf("delete exec %s: %v", id, err)
		}
	}
	if _, err := h.Delete(ctx, &api.DeleteRequest{ID: "created"}); err != nil {
		t.Errorf("delete a task that was never started: %v", err)
	}
	if _, err := h.CloseIO(ctx, &api.CloseIORequest{ID: "running", Stdin: true}); err != nil {
		t.Errorf("close stdin where there is none: %v", err)
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	h := newHarness(t)
	h.sandbox.createErr = errors.New("boot the VM: the kernel is missing")
	_, err := h.Create(t.Context(), &api.CreateTaskRequest{ID: "c", Bundle: h.bundle})
	if err == nil || !strings.Contains(err.Error(), "the kernel is missing") || !h.sandbox.isStopped() {
		t.Errorf("create: %v, sandbox stopped %v", err, h.sandbox.isStopped())
	}
	// What containerd does next.
	if _, err := h.Delete(t.Context(), &api.DeleteRequest{ID: "c"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("delete: %v, want NotFound", err)
	}
	h.shutdown("c")
	if w := h.journal.Words(); len(w) != 0 {
		t.Errorf("events of what never was: %v", w)
	}
}

// A shim that is told to end tells of the exits that this makes.
func TestEndedFromOutside(t *testing.T) {
	h := newHarness(t)
	h.run("c")
	h.create("d")
	h.cancel()
	h.served <- <-h.served
	got := h.journal.Words()
	slices.Sort(got)
	if want := []string{"create c", "create d", "exit c 137", "exit d 137", "start c"}; !slices.Equal(got, want) {
		t.Errorf("told %v, want %v", got, want)
	}
}

func TestNotReady(t *testing.T) {
	sb := newFakeSandbox()
	start := func(context.Context, SandboxConfig) (sandbox, error) { return sb, nil }
	s, err := newService(t.Context(), Config{ID: "c", Namespace: "ns"}, start, &tasktest.Journal{})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Serve(t.Context(), listener(t), func() error { return os.ErrClosed })
	if !errors.Is(err, os.ErrClosed) || !sb.isStopped() {
		t.Errorf("Serve: %v, sandbox stopped %v", err, sb.isStopped())
	}
}
