package task_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/shim/task/tasktest"
	"github.com/husk-containers/husk/virtcontainers"
)

// sandbox has one container.
type sandbox struct{ container *tasktest.Container }

func (sandbox) PID() int { return 4711 }

func (s sandbox) CreateContainer(context.Context, virtcontainers.ContainerConfig) (task.Container, error) {
	return s.container, nil
}

// harness is a shim's part in tasks.
type harness struct {
	t       *testing.T
	shim    task.Shim
	journal tasktest.Journal
	woken   int
}

func newHarness(t *testing.T) *harness {
	h := &harness{t: t}
	done := make(chan struct{})
	var watches sync.WaitGroup
	h.shim = task.Shim{
		Namespace: "ns", Publish: h.journal.Publish, Done: done, Deleted: func(string) {}, Wake: func(context.Context) error { h.woken++; return nil },
		Watch: func(f func()) bool { watches.Go(f); return true },
	}
	t.Cleanup(func() { close(done); watches.Wait() })
	return h
}

// create makes a task that is created.
func (h *harness) create(id string) (*task.Task, *tasktest.Container) {
	h.t.Helper()
	c := tasktest.NewContainer()
	k, err := h.shim.Create(h.t.Context(), sandbox{c}, &api.CreateTaskRequest{ID: id}, false)
	if err != nil {
		h.t.Fatal(err)
	}
	k.Watch()
	return k, c
}

// run makes a task that runs.
func (h *harness) run(id string) (*task.Task, *tasktest.Container) {
	h.t.Helper()
	k, c := h.create(id)
	if _, err := k.Start(h.t.Context(), &api.StartRequest{ID: id}); err != nil {
		h.t.Fatal(err)
	}
	return k, c
}

// wait waits for the exit of a task's init.
func (h *harness) wait(k *task.Task) {
	h.t.Helper()
	if _, err := k.Wait(h.t.Context(), &api.WaitRequest{}); err != nil {
		h.t.Fatal(err)
	}
}

// Who waits for an exec that the task's end keeps from being started is told.
func TestAnExecThatIsNotStartedEndsWithTheTask(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	k, c := h.run("c")
	if _, err := k.Exec(ctx, &api.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: []byte(`{}`)}}); err != nil {
		t.Fatal(err)
	}
	c.End(1)
	h.wait(k)
	if r, err := k.Wait(ctx, &api.WaitRequest{ID: "c", ExecID: "e"}); err != nil || r.ExitStatus != 255 {
		t.Errorf("Wait: %v, %v; want 255", r, err)
	}
	if _, err := k.Start(ctx, &api.StartRequest{ID: "c", ExecID: "e"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Start: %v, want FailedPrecondition", err)
	}
	if _, err := k.Delete(ctx, &api.DeleteRequest{ID: "c"}); err != nil {
		t.Error(err)
	}
	if want := []string{"start c", "added e", "exit c 1", "delete c"}; !slices.Equal(h.journal.Words(), want) {
		t.Errorf("told %v, want %v", h.journal.Words(), want)
	}
}

// An exit that comes before Start has returned is told after the start.
func TestAnExitWaitsForItsStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		k, c := h.create("c")
		c.Main().OnStart = func() {
			c.Main().ExitWith(1)
			synctest.Wait() // whoever would tell of it has
		}
		if _, err := k.Start(t.Context(), &api.StartRequest{ID: "c"}); err != nil {
			t.Error(err)
		}
		h.wait(k)
		if want := []string{"start c", "exit c 1"}; !slices.Equal(h.journal.Words(), want) {
			t.Errorf("told %v, want %v", h.journal.Words(), want)
		}
	})
}

// Whatever exits when, a start is told before its exit, and the execs' exits
// before the task's.
func TestOrderUnderRaces(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	for round := range 100 {
		id := fmt.Sprintf("c%d", round)
		k, c := h.create(id)
		if round%2 == 0 {
			c.Main().OnStart = func() { c.Main().ExitWith(1) } // before Start returns
		}
		if _, err := k.Start(ctx, &api.StartRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		var execs sync.WaitGroup
		for i := range 4 {
			exec := fmt.Sprintf("%s-e%d", id, i)
			execs.Go(func() {
				_, err := k.Exec(ctx, &api.ExecProcessRequest{ID: id, ExecID: exec, Spec: &anypb.Any{Value: []byte(`{}`)}})
				if err != nil {
					t.Error(err)
				}
				k.Start(ctx, &api.StartRequest{ID: id, ExecID: exec}) //nolint:errcheck // the task may have ended
			})
		}
		if rand.IntN(2) == 0 {
			execs.Wait()
		}
		c.End(1)
		execs.Wait()
		c.End(1) // execs that were added since
		h.wait(k)
		if _, err := k.Delete(ctx, &api.DeleteRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	at := map[string]int{}
	words := h.journal.Words()
	for i, w := range words {
		w = strings.TrimSuffix(w, " 1")
		if _, twice := at[w]; twice {
			t.Errorf("told twice: %s", w)
		}
		at[w] = i
	}
	before := func(a, b string) {
		ia, oka := at[a]
		ib, okb := at[b]
		if !oka || !okb || ia > ib {
			t.Errorf("%q at %d (%v) does not come before %q at %d (%v)", a, ia, oka, b, ib, okb)
		}
	}
	for w := range at {
		kind, id, _ := strings.Cut(w, " ")
		task, _, isExec := strings.Cut(id, "-")
		switch {
		case kind == "start":
			before(w, "exit "+id)
		case kind == "exit" && isExec:
			before("start "+id, w)
			before(w, "exit "+task)
		case kind == "exit":
			before(w, "delete "+id)
		}
	}
}

func TestDeleteOfATaskThatIsBeingDeleted(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	k, c := h.run("c")
	begun, end := make(chan struct{}), make(chan struct{})
	c.OnDelete = func() { close(begun); <-end }
	c.End(3)
	h.wait(k)
	remove := func(ctx context.Context) <-chan error {
		result := make(chan error, 1)
		go func() {
			_, err := k.Delete(ctx, &api.DeleteRequest{ID: "c"})
			result <- err
		}()
		return result
	}
	first := remove(ctx)
	<-begun
	if st, err := k.State(ctx, &api.StateRequest{ID: "c"}); err != nil || st.Status != taskapi.Status_STOPPED || st.ExitStatus != 3 {
		t.Errorf("state while being deleted: %v, %v, want stopped with status 3", st, err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := <-remove(short); !errors.Is(err, context.DeadlineExceeded) && !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("second delete, while the first is at work: %v", err)
	}
	second := remove(ctx)
	close(end)
	if err := <-first; err != nil {
		t.Errorf("first delete: %v", err)
	}
	if err := <-second; !errdefs.IsNotFound(err) {
		t.Errorf("second delete: %v, want NotFound", err)
	}
}
