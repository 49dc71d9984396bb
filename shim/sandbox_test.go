package shim

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
)

const netns = "/run/netns/cni-1"

func (h *harness) createPod() error {
	_, err := h.pod.CreateSandbox(h.t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: h.bundle, NetnsPath: netns})
	return err
}

func (h *harness) startPod() error {
	_, err := h.pod.StartSandbox(h.t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	return err
}

func (h *harness) stopPod() error {
	_, err := h.pod.StopSandbox(h.t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "pod"})
	return err
}

func (h *harness) status() (*sandboxapi.SandboxStatusResponse, error) {
	return h.pod.SandboxStatus(h.t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: "pod", Verbose: true})
}

func (h *harness) waitPod() (*sandboxapi.WaitSandboxResponse, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	return h.pod.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
}

// shutdownPod ends the shim as containerd does, and waits for its end.
func (h *harness) shutdownPod() {
	h.t.Helper()
	_, err := h.pod.ShutdownSandbox(h.t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"})
	if err != nil {
		h.t.Error(err)
	}
	h.conn.Close() //nolint:errcheck // it may have ended
	select {
	case err := <-h.served:
		h.served <- err
	case <-time.After(30 * time.Second):
		h.t.Fatal("the shim lives on after ShutdownSandbox")
	}
}

// must fails the test where a step did.
func (h *harness) must(errs ...error) {
	h.t.Helper()
	if err := errors.Join(errs...); err != nil {
		h.t.Fatal(err)
	}
}

// The states that a pod can be in, and what each call says in each.
func TestSandboxStates(t *testing.T) {
	var (
		ok          error
		exists      = errdefs.ErrAlreadyExists
		notFound    = errdefs.ErrNotFound
		tooEarly    = errdefs.ErrFailedPrecondition
		unavailable = errdefs.ErrUnavailable
		unsupported = errdefs.ErrNotImplemented
	)
	calls := []struct {
		name string
		call func(h *harness) error
	}{
		{"create", (*harness).createPod},
		{"start", (*harness).startPod},
		{"ping", func(h *harness) error {
			_, err := h.pod.PingSandbox(h.t.Context(), &sandboxapi.PingRequest{SandboxID: "pod"})
			return err
		}},
		{"status", func(h *harness) error { _, err := h.status(); return err }},
		{"metrics", func(h *harness) error {
			resp, err := h.pod.SandboxMetrics(h.t.Context(), &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"})
			if err != nil {
				return err
			}
			m, uerr := typeurl.UnmarshalAny(resp.Metrics.GetData())
			if got, ok := m.(*stats.Metrics); uerr != nil || !ok || got.Memory.GetUsage() != 1<<28 || resp.Metrics.GetID() != "pod" || resp.Metrics.GetTimestamp() == nil {
				h.t.Errorf("metrics: %v, %v", resp, uerr)
			}
			return nil
		}},
		{"platform", func(h *harness) error {
			resp, err := h.pod.Platform(h.t.Context(), &sandboxapi.PlatformRequest{SandboxID: "pod"})
			if err == nil && (resp.Platform.OS != "linux" || resp.Platform.Architecture != runtime.GOARCH) {
				h.t.Errorf("platform: %v", resp)
			}
			return err
		}},
		{"update", func(h *harness) error {
			_, err := h.pod.UpdateSandbox(h.t.Context(), &sandboxapi.UpdateSandboxRequest{
				SandboxID: "pod", Sandbox: &types.Sandbox{SandboxID: "pod"}, Fields: []string{"extensions"},
			})
			return err
		}},
		{"create a task", func(h *harness) error {
			_, err := h.Create(h.t.Context(), &api.CreateTaskRequest{ID: "m", Bundle: h.bundle})
			return err
		}},
		{"stop", (*harness).stopPod},
		{"connect", func(h *harness) error {
			_, err := h.Connect(h.t.Context(), &api.ConnectRequest{ID: "pod"})
			return err
		}},
		{"shut down by the task API", func(h *harness) error {
			_, err := h.Shutdown(h.t.Context(), &api.ShutdownRequest{ID: "m"})
			return err
		}},
	}
	for name, tt := range map[string]struct {
		reach func(h *harness)
		want  []error // of each call, made in a pod of its own
		state string
		waits bool // Wait blocks
		exit  uint32
		ends  bool // a Shutdown by the task API ends the shim
	}{
		"absent": {
			reach: func(*harness) {},
			want:  []error{ok, tooEarly, notFound, notFound, notFound, ok, unsupported, tooEarly, ok, notFound, ok}, ends: true,
		},
		"not to be made": {
			reach: func(h *harness) {
				h.makeErr = errdefs.ErrInvalidArgument
				if err := h.createPod(); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
					h.t.Errorf("create: %v", err)
				}
				h.makeErr = nil
			},
			want: []error{ok, tooEarly, notFound, notFound, notFound, ok, unsupported, tooEarly, ok, notFound, ok}, ends: true,
		},
		"created": {
			reach: func(h *harness) { h.must(h.createPod()) },
			want:  []error{exists, ok, tooEarly, ok, ok, ok, unsupported, tooEarly, ok, ok, ok},
			state: stateNotReady, waits: true,
		},
		"not to be booted": {
			reach: func(h *harness) {
				h.sandbox.startErr = errors.New("the kernel is missing")
				h.must(h.createPod())
				if err := h.startPod(); err == nil || !strings.Contains(err.Error(), "the kernel is missing") {
					h.t.Errorf("start: %v", err)
				}
				h.sandbox.die()
			},
			want:  []error{exists, tooEarly, unavailable, ok, ok, ok, unsupported, ok, ok, ok, ok},
			state: stateNotReady, exit: 137,
		},
		"ready": {
			reach: func(h *harness) { h.must(h.createPod(), h.startPod()) },
			want:  []error{exists, tooEarly, ok, ok, ok, ok, unsupported, ok, ok, ok, ok},
			state: stateReady, waits: true,
		},
		"dead": {
			reach: func(h *harness) { h.must(h.createPod(), h.startPod()); h.sandbox.die() },
			want:  []error{exists, tooEarly, unavailable, ok, ok, ok, unsupported, ok, ok, ok, ok},
			state: stateNotReady, exit: 137,
		},
		"stopped": {
			reach: func(h *harness) { h.must(h.createPod(), h.startPod(), h.stopPod()) },
			want:  []error{exists, tooEarly, unavailable, ok, ok, ok, unsupported, tooEarly, ok, ok, ok},
			state: stateNotReady,
		},
		"stopped before its start": {
			reach: func(h *harness) { h.must(h.createPod(), h.stopPod()) },
			want:  []error{exists, tooEarly, unavailable, ok, ok, ok, unsupported, tooEarly, ok, ok, ok},
			state: stateNotReady,
		},
	} {
		for i, c := range calls {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				h := newPod(t)
				tt.reach(h)
				err := c.call(h)
				if want := tt.want[i]; want == nil && err != nil || want != nil && !errors.Is(errgrpc.ToNative(err), want) {
					t.Errorf("%v, want %v", err, want)
				}
				if c.name == "shut down by the task API" && tt.ends {
					h.conn.Close() //nolint:errcheck // it may have ended
					h.served <- <-h.served
					return
				}
				h.shutdownPod() // from every state
				if len(h.made) > 0 && h.makeErr == nil && tt.state != "" && !h.sandbox.isStopped() {
					t.Error("the sandbox was not stopped")
				}
			})
		}
		if tt.state == "" {
			continue
		}
		t.Run(name+"/wait", func(t *testing.T) {
			h := newPod(t)
			tt.reach(h)
			if tt.waits {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				defer cancel()
				if r, err := h.pod.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}); err == nil {
					t.Errorf("wait did not: %v", r)
				}
				if st, err := h.status(); err != nil || st.State != tt.state || st.Pid != fakePID || st.ExitedAt != nil {
					t.Errorf("status: %v, %v", st, err)
				}
				waited := make(chan error, 1)
				go func() {
					r, err := h.waitPod()
					if err == nil && (r.ExitStatus != 0 || time.Since(r.ExitedAt.AsTime()) > time.Minute) {
						t.Errorf("wait: %v", r)
					}
					waited <- err
				}()
				h.must(h.stopPod(), <-waited)
			} else if r, err := h.waitPod(); err != nil || r.ExitStatus != tt.exit || time.Since(r.ExitedAt.AsTime()) > time.Minute {
				t.Errorf("wait: %v, %v, want status %d", r, err, tt.exit)
			}
			if st, err := h.status(); err != nil || st.State != stateNotReady || st.Pid != 0 || st.ExitedAt == nil || st.CreatedAt == nil {
				t.Errorf("status in the end: %v, %v", st, err)
			}
			h.must(h.stopPod(), h.stopPod())
		})
	}
}

// containerd deletes the bundle of a shim's first task with it, and then runs delete
// there, whatever other tasks there are.
func TestShimAndSandboxLeaveABundleThatIsDeletedBeforeThePodsContainers(t *testing.T) {
	for name, members := range map[string]int{"alone": 0, "with a container": 1} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			first := h.run("c")
			for range members {
				h.run("member")
			}
			first.End(137)
			h.wait("c", "")
			_, err := h.Delete(t.Context(), &api.DeleteRequest{ID: "c"})
			h.must(err)
			if want := members > 0; h.left.Load() != want || h.sandbox.left.Load() != want {
				t.Errorf("left by shim: %t, by sandbox: %t; want %t", h.left.Load(), h.sandbox.left.Load(), want)
			}
		})
	}
}
