package shim

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/shim/task/tasktest"
)

// A pod's life as containerd leads it.
func TestPodLife(t *testing.T) {
	h := newPod(t)
	ctx := t.Context()
	config := []byte("\x12\x04web0") // hostname
	_, err := h.pod.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", NetnsPath: netns, Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: config},
	})
	h.must(err)
	if want := []SandboxConfig{{Hold: true, NetNS: netns, Pod: pod.Config{Hostname: "web0"}}}; !cmp.Equal(want, h.made) {
		t.Errorf("made of %+v, want %+v", h.made, want)
	}
	start, err := h.pod.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	if err != nil || start.Pid != fakePID || !start.CreatedAt.AsTime().Equal(h.sandbox.Created()) {
		t.Fatalf("start: %v, %v", start, err)
	}
	st, err := h.status()
	if err != nil || st.SandboxID != "pod" || st.Pid != fakePID || !st.CreatedAt.AsTime().Equal(h.sandbox.Created()) || st.State != "SANDBOX_READY" {
		t.Fatalf("status: %v, %v", st, err)
	}
	var info criInfo
	if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil {
		t.Error(err)
	}
	if info.PID != fakePID || info.ProcessStatus != "running" || info.RuntimeSpec.Linux.Namespaces[0].Path != netns {
		t.Errorf("CRI's info: %+v", info)
	}
	delete(st.Info, "info")
	if diff := cmp.Diff(map[string]string{"pid": "4711", "state": "SANDBOX_READY", "netns": netns}, st.Info); diff != "" {
		t.Errorf("info: %s", diff)
	}
	if r, err := h.Connect(ctx, &api.ConnectRequest{ID: "pod"}); err != nil || r.ShimPid != uint32(os.Getpid()) { // at containerd's restart
		t.Errorf("connect: %v, %v", r, err)
	}

	h.run("m1")
	h.sandbox.createErr = errors.New("no such image")
	if _, err := h.Create(ctx, &api.CreateTaskRequest{ID: "m2", Bundle: h.bundle}); err == nil || h.sandbox.isStopped() {
		t.Errorf("create of a member that cannot be: %v, pod stopped %v", err, h.sandbox.isStopped())
	}
	h.sandbox.createErr = nil
	shutdown := func() {
		t.Helper()
		_, err := h.Shutdown(ctx, &api.ShutdownRequest{ID: "m2"})
		h.must(err)
	}
	shutdown() // what containerd does next
	h.sandbox.container("m1").End(1)
	h.wait("m1", "")
	_, err = h.Delete(ctx, &api.DeleteRequest{ID: "m1"})
	h.must(err)
	shutdown()
	h.run("m3") // the pod outlives its last container

	h.must(h.stopPod())
	if w := h.wait("m3", ""); w.ExitStatus != 137 {
		t.Errorf("a member's end: %v", w)
	}
	if r, err := h.waitPod(); err != nil || r.ExitStatus != 0 {
		t.Errorf("wait: %v, %v", r, err)
	}
	_, err = h.Delete(ctx, &api.DeleteRequest{ID: "m3"})
	h.must(err)
	shutdown()
	if st, err := h.status(); err != nil || st.State != "SANDBOX_NOTREADY" {
		t.Errorf("status: %v, %v", st, err)
	}
	h.shutdownPod()
	want := []string{"create m1", "start m1", "exit m1 1", "delete m1", "create m3", "start m3", "exit m3 137", "delete m3"}
	if got := h.journal.Words(); !slices.Equal(got, want) {
		t.Errorf("told %v, want %v", got, want)
	}
}

// Without a network namespace there is none to tell of.
func TestPodWithoutNetNS(t *testing.T) {
	h := newPod(t)
	_, err := h.pod.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", Rootfs: []*types.Mount{{Type: "bind"}}, Options: &anypb.Any{TypeUrl: "other", Value: []byte{1}},
	})
	h.must(err, h.startPod())
	if st, err := h.status(); err != nil || st.State != stateReady || st.Info["netns"] != "" || st.Info["info"] != `{"pid":4711,"processStatus":"running","runtimeSpec":null}` {
		t.Errorf("status: %v, %v", st, err)
	}
	if st, err := h.pod.SandboxStatus(t.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: "pod"}); err != nil || len(st.Info) > 0 {
		t.Errorf("status that is not to be verbose: %v, %v", st, err)
	}
}

func TestOtherSandboxesAreNotFound(t *testing.T) {
	h := newPod(t)
	h.must(h.createPod(), h.startPod())
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"create": func() error {
			_, err := h.pod.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{SandboxID: "x"})
			return err
		},
		"start": func() error {
			_, err := h.pod.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "x"})
			return err
		},
		"platform": func() error { _, err := h.pod.Platform(ctx, &sandboxapi.PlatformRequest{SandboxID: "x"}); return err },
		"ping":     func() error { _, err := h.pod.PingSandbox(ctx, &sandboxapi.PingRequest{SandboxID: "x"}); return err },
		"status": func() error {
			_, err := h.pod.SandboxStatus(ctx, &sandboxapi.SandboxStatusRequest{SandboxID: "x"})
			return err
		},
		"wait": func() error {
			_, err := h.pod.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "x"})
			return err
		},
		"stop": func() error {
			_, err := h.pod.StopSandbox(ctx, &sandboxapi.StopSandboxRequest{SandboxID: "x"})
			return err
		},
		"metrics": func() error {
			_, err := h.pod.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: "x"})
			return err
		},
		"shut down": func() error {
			_, err := h.pod.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: "x"})
			return err
		},
	} {
		if err := call(); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			t.Errorf("%s: %v, want NotFound", name, err)
		}
	}
}

func TestGarbageForOptions(t *testing.T) {
	h := newPod(t)
	_, err := h.pod.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", Options: &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: []byte("\xff")},
	})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) || len(h.made) > 0 {
		t.Errorf("create: %v, made %v", err, h.made)
	}
	h.shutdownPod()
}

// A shim that is told to end while the sandbox is being made stops it.
func TestShutdownWhileBeingMade(t *testing.T) {
	sb := newFakeSandbox()
	begun, goOn := make(chan struct{}), make(chan struct{})
	start := func(context.Context, SandboxConfig) (sandbox, error) {
		close(begun)
		<-goOn
		return sb, nil
	}
	s, err := newService(t.Context(), Config{ID: "pod", Hold: true}, start, &tasktest.Journal{})
	if err != nil {
		t.Fatal(err)
	}
	created, stopped := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := s.createSandbox(context.Background(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod"})
		created <- err
	}()
	<-begun
	go func() { stopped <- s.stop() }()
	select {
	case err := <-stopped:
		t.Fatalf("stop did not wait for what is being made: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	close(goOn)
	if err := errors.Join(<-created, <-stopped); err != nil || !sb.isStopped() {
		t.Errorf("%v, sandbox stopped %v", err, sb.isStopped())
	}
	// Too late for another.
	if err := s.makeSandbox(t.Context(), SandboxConfig{}); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
}

func TestNothingIsMadeAfterTheEnd(t *testing.T) {
	s, err := newService(t.Context(), Config{ID: "pod", Hold: true}, nil, &tasktest.Journal{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if err := s.makeSandbox(t.Context(), SandboxConfig{}); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

// A pod by annotations: its sandbox container boots the VM and others join.
func TestPodByAnnotations(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	annotations := func(role string) string {
		return `"io.kubernetes.cri.container-type":"` + role + `","io.kubernetes.cri.sandbox-id":"c"`
	}
	create := func(id, role string) error {
		r, err := h.Create(ctx, &api.CreateTaskRequest{ID: id, Bundle: h.newBundle(annotations(role))})
		if err == nil && r.Pid != fakePID {
			t.Errorf("%s: pid %d", id, r.Pid)
		}
		return err
	}
	h.must(create("c", "sandbox"))
	if !slices.Equal(h.sandbox.sandboxes, []string{"c"}) {
		t.Errorf("containers that stand for a pod: %v", h.sandbox.sandboxes)
	}
	if r, err := h.Pids(ctx, &api.PidsRequest{ID: "c"}); err != nil || len(r.Processes) != 1 || r.Processes[0].Pid != fakePID {
		t.Errorf("pids: %v, %v", r, err)
	}
	h.must(create("m1", "container"))
	if !slices.Equal(h.sandbox.sandboxes, []string{"c"}) {
		t.Errorf("containers that stand for a pod: %v", h.sandbox.sandboxes)
	}
	h.sandbox.createErr = errors.New("no")
	if err := create("m2", "container"); err == nil || h.sandbox.isStopped() {
		t.Errorf("create of a member that cannot be: %v, pod stopped %v", err, h.sandbox.isStopped())
	}
	if err := create("m3", "sandboks"); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("create with a role that is none: %v", err)
	}
	h.sandbox.createErr = nil
	for _, id := range []string{"m1", "c"} {
		h.sandbox.container(id).End(0)
		h.wait(id, "")
		if _, err := h.Shutdown(ctx, &api.ShutdownRequest{ID: id}); err != nil { // too early
			t.Error(err)
		}
	}
	if r, err := h.Pids(ctx, &api.PidsRequest{ID: "c"}); err != nil || len(r.Processes) != 0 {
		t.Errorf("pids: %v, %v", r, err)
	}
	for _, id := range []string{"m1", "c"} {
		_, err := h.Delete(ctx, &api.DeleteRequest{ID: id})
		h.must(err)
	}
	h.shutdown("c")
	if !h.sandbox.isStopped() {
		t.Error("the pod lives on")
	}
}

// The sandbox API sees the sandbox of the task API too, and makes no second one.
func TestBothAPIsSeeOneSandbox(t *testing.T) {
	h := newHarness(t)
	ctx := t.Context()
	if _, err := h.pod.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{SandboxID: "c"}); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("create: %v", err)
	}
	if _, err := h.pod.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "c"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("start: %v", err)
	}
	h.create("c")
	if _, err := h.pod.PingSandbox(ctx, &sandboxapi.PingRequest{SandboxID: "c"}); err != nil {
		t.Errorf("ping: %v", err)
	}
}

func TestSandboxThatCannotBeMadeAtOnce(t *testing.T) {
	cause := errors.New("no such kernel")
	start := func(context.Context, SandboxConfig) (sandbox, error) { return nil, cause }
	if _, err := newService(t.Context(), Config{ID: "c"}, start, &tasktest.Journal{}); !errors.Is(err, cause) {
		t.Error(err)
	}
}

func TestCreateNeedsASpec(t *testing.T) {
	h := newHarness(t)
	if err := os.Remove(filepath.Join(h.bundle, "config.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(t.Context(), &api.CreateTaskRequest{ID: "c", Bundle: h.bundle}); err == nil || !strings.Contains(err.Error(), "read the bundle's spec") {
		t.Error(err)
	}
}
