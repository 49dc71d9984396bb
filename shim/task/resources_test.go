package task_test

import (
	"slices"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestPauseAndResume(t *testing.T) {
	h := newHarness(t)
	k, c := h.create("c")
	ctx := t.Context()
	status := func(want taskapi.Status) {
		t.Helper()
		if resp, err := k.State(ctx, &api.StateRequest{}); err != nil || resp.Status != want {
			t.Fatalf("state: %v, %v; want %s", resp, err, want)
		}
	}
	if _, err := k.Pause(ctx, &api.PauseRequest{}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("pause before the start: %v", err)
	}
	if _, err := k.Start(ctx, &api.StartRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Pause(ctx, &api.PauseRequest{}); err != nil {
		t.Fatal(err)
	}
	status(taskapi.Status_PAUSED)
	if _, err := k.Pause(ctx, &api.PauseRequest{}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("pause again: %v", err)
	}
	if _, err := k.Delete(ctx, &api.DeleteRequest{}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("delete while paused: %v", err)
	}
	if _, err := k.Resume(ctx, &api.ResumeRequest{}); err != nil {
		t.Fatal(err)
	}
	status(taskapi.Status_RUNNING)
	if _, err := k.Resume(ctx, &api.ResumeRequest{}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("resume again: %v", err)
	}
	if _, err := k.Kill(ctx, &api.KillRequest{Signal: 15}); err != nil || h.woken != 0 {
		t.Fatalf("SIGTERM: %v; the sandbox was woken %d times", err, h.woken)
	}
	if _, err := k.Kill(ctx, &api.KillRequest{Signal: 9}); err != nil || h.woken != 1 {
		t.Fatalf("SIGKILL: %v; the sandbox was woken %d times", err, h.woken)
	}
	c.Main().ExitWith(137)
	h.wait(k)
	want := []string{"start c", "paused c", "resumed c", "exit c 137"}
	if got := h.journal.Words(); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

// An OOM is told once, and before the exit, whoever comes first.
func TestOOMIsToldBeforeTheExit(t *testing.T) {
	for _, watched := range []bool{false, true} {
		h := newHarness(t)
		k, c := h.run("c")
		c.RunOutOfMemory()
		if watched {
			k.TellOOM()
		}
		c.Main().ExitWith(137)
		h.wait(k)
		k.TellOOM()
		if got, want := h.journal.Words(), []string{"start c", "oom c", "exit c 137"}; !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
	}
}

// containerd finds the type of statistics by its name.
func TestStats(t *testing.T) {
	h := newHarness(t)
	k, _ := h.run("c")
	resp, err := k.Stats(t.Context(), &api.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := typeurl.UnmarshalAny(resp.Stats)
	if err != nil {
		t.Fatal(err)
	}
	if m, ok := got.(*stats.Metrics); !ok || m.Pids.GetCurrent() != 7 {
		t.Errorf("got a %T: %v", got, got)
	}
}

func TestUpdate(t *testing.T) {
	h := newHarness(t)
	k, c := h.run("c")
	if _, err := k.Update(t.Context(), &api.UpdateTaskRequest{Resources: &anypb.Any{Value: []byte(`{"memory":{"limit":1048576}}`)}}); err != nil {
		t.Fatal(err)
	}
	if m := c.Updated.Memory; m == nil || *m.Limit != 1<<20 {
		t.Errorf("the container was given %v", c.Updated)
	}
	for _, raw := range []string{"", "{", `{"memory":1}`} {
		if _, err := k.Update(t.Context(), &api.UpdateTaskRequest{Resources: &anypb.Any{Value: []byte(raw)}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want InvalidArgument", raw, err)
		}
	}
}
