package path_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/husk-containers/husk/hypervisor/hypertest"
)

func TestStopWhileBooting(t *testing.T) {
	booting := make(chan struct{})
	h := newHost(t, false, []string{"true"}, func(_ *host, l *hypertest.Loopback) {
		l.Guest = func(ctx context.Context, _ *hypertest.GuestEnd) error {
			close(booting)
			<-ctx.Done()
			return nil
		}
	})
	created := make(chan error, 1)
	go func() { created <- h.create(nil, false) }()
	<-booting
	within(t, func() {
		if err := h.sandbox.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-created; err == nil || !strings.Contains(err.Error(), "stopped") || strings.Contains(err.Error(), "\n") {
			t.Errorf("Create: %v, want one line that says that the sandbox is stopped", err)
		}
	})
	h.nothingLeft()
}

func TestCreateTwice(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	if err := errgrpc.ToNative(h.create(nil, false)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the second Create: %v, want AlreadyExists", err)
	}
	if _, err := h.Start(t.Context(), &taskapi.StartRequest{ID: "c"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("the second Start: %v, want FailedPrecondition", err)
	}
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 137 {
		t.Errorf("exit status %d, want 137", got)
	}
	h.remove()
	if _, err := h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("the second Delete: %v, want NotFound", err)
	}
	// What is gone makes room.
	h.run(nil, false)
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	h.exited("")
	h.remove()
}

func TestExecIDsAreTakenUntilDeleted(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	for i := range 3 {
		h.exec("e", nil, "sh", "-c", fmt.Sprintf("exit %d", i))
		if err := errgrpc.ToNative(h.tryExec("e", nil, "true")); !errdefs.IsAlreadyExists(err) {
			t.Errorf("an exec of a taken id: %v, want AlreadyExists", err)
		}
		if got := h.exited("e"); got != uint32(i) {
			t.Errorf("exit status %d, want %d", got, i)
		}
		if _, err := h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: "e"}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnExecThatCannotStartHasExited(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	c := h.newClient(true)
	if err := h.tryExec("e", c, "no-such-command"); err != nil {
		t.Fatal(err)
	}
	_, err := h.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "e"})
	if err == nil || !strings.Contains(err.Error(), "no-such-command") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Start: %v, want one line that names the command", err)
	}
	if got := h.exited("e"); got != 255 {
		t.Errorf("exit status %d, want 255", got)
	}
	if got := h.output(c); got != "" { // its end, at once
		t.Errorf("output %q", got)
	}
	st, err := h.State(t.Context(), &taskapi.StateRequest{ID: "c", ExecID: "e"})
	if err != nil || st.Status != task.Status_STOPPED {
		t.Errorf("state %v, %v", st, err)
	}
	if _, err := h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Error(err)
	}
	if _, err := h.Wait(t.Context(), &taskapi.WaitRequest{ID: "c", ExecID: "e"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("Wait for what is deleted: %v, want NotFound", err)
	}
}

func TestShutdownHeedsWhatRuns(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	if _, err := h.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: "c", Now: true}); err != nil {
		t.Fatal(err)
	}
	h.exec("e", nil, "true")
	if got := h.exited("e"); got != 0 {
		t.Errorf("exit status %d", got)
	}
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	h.exited("")
	h.remove()
	if _, err := h.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if err := <-h.served; err != nil {
		t.Error(err)
	}
	h.served <- nil // for the end of the test
	h.nothingLeft()
}

// Whatever is under way when the sandbox is stopped ends, and leaves nothing.
func TestStopAmidEverything(t *testing.T) {
	for i := range 10 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			h := newHost(t, false, []string{"sleep", "1000"}, nil)
			var callers sync.WaitGroup
			begun := make(chan struct{}, 100)
			callers.Go(func() {
				h.create(nil, false) //nolint:errcheck // which call fails is chance
				begun <- struct{}{}
				h.Start(t.Context(), &taskapi.StartRequest{ID: "c"}) //nolint:errcheck // likewise
				begun <- struct{}{}
				for n := range 3 {
					id := fmt.Sprint(n)
					callers.Go(func() {
						h.tryExec(id, nil, "sleep", "1000") //nolint:errcheck // likewise
						begun <- struct{}{}
						h.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: id})         //nolint:errcheck // likewise
						h.Wait(t.Context(), &taskapi.WaitRequest{ID: "c", ExecID: id})           //nolint:errcheck // likewise
						h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: id})       //nolint:errcheck // likewise
						h.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 9, All: true}) //nolint:errcheck // likewise
						h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})                   //nolint:errcheck // likewise
						h.ResizePty(t.Context(), &taskapi.ResizePtyRequest{ID: "c", ExecID: id}) //nolint:errcheck // likewise
						h.CloseIO(t.Context(), &taskapi.CloseIORequest{ID: "c", Stdin: true})    //nolint:errcheck // likewise
						h.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"})                       //nolint:errcheck // likewise
					})
				}
			})
			for range i % 6 {
				<-begun
			}
			within(t, func() {
				if err := h.sandbox.Stop(t.Context()); err != nil {
					t.Error(err)
				}
				callers.Wait()
			})
			h.nothingLeft()
		})
	}
}
