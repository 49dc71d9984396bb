package shim

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/shim/task"
	"github.com/husk-containers/husk/shim/task/tasktest"
	"github.com/husk-containers/husk/virtcontainers"
)

const fakePID = 4711

// fakeSandbox has containers whose processes do nothing until a test ends them.
type fakeSandbox struct {
	left                atomic.Bool // the bundle
	paused              atomic.Bool
	createErr, startErr error
	ooms                chan string
	done                chan struct{}

	mu         sync.Mutex
	containers map[string]*tasktest.Container
	sandboxes  []string // ids of the containers that stand for a pod
	stopped    bool
	err        error
}

func newFakeSandbox() *fakeSandbox {
	return &fakeSandbox{ooms: make(chan string), done: make(chan struct{}), containers: map[string]*tasktest.Container{}}
}

func (s *fakeSandbox) PID() int                    { return fakePID }
func (s *fakeSandbox) Created() time.Time          { return time.Unix(5e8, 0) }
func (s *fakeSandbox) Leave() error                { s.left.Store(true); return nil }
func (s *fakeSandbox) Start(context.Context) error { return s.startErr }
func (s *fakeSandbox) OOMs() <-chan string         { return s.ooms }
func (s *fakeSandbox) Done() <-chan struct{}       { return s.done }

func (s *fakeSandbox) Usage() (*stats.Metrics, error) {
	return &stats.Metrics{Memory: &stats.MemoryStat{Usage: 1 << 28}}, nil
}
func (s *fakeSandbox) Paused() bool                 { return s.paused.Load() }
func (s *fakeSandbox) Pause(context.Context) error  { s.paused.Store(true); return nil }
func (s *fakeSandbox) Resume(context.Context) error { s.paused.Store(false); return nil }
func (s *fakeSandbox) Machine() virtcontainers.Machine {
	return virtcontainers.Machine{VCPUs: 2, MemoryMiB: 512, MaxVCPUs: 4, MaxMemoryMiB: 2048, CPUs: "0-1", Pinned: true}
}

func (s *fakeSandbox) VCPUThreads(context.Context) (map[int]int, error) {
	return map[int]int{0: fakePID + 1, 1: fakePID + 2}, nil
}

func (s *fakeSandbox) Reclaim(context.Context) (before, after int, err error) { return 300, 200, nil }

func (s *fakeSandbox) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// die ends the VM as nobody wanted.
func (s *fakeSandbox) die() { s.end(errors.New("QEMU was killed by SIGKILL")) }

func (s *fakeSandbox) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.done:
		return
	default:
	}
	s.err = err
	for _, c := range s.containers {
		c.End(137)
	}
	close(s.done)
}

func (s *fakeSandbox) CreateContainer(_ context.Context, cfg virtcontainers.ContainerConfig) (task.Container, error) {
	if s.createErr != nil {
		return nil, s.createErr
	}
	c := tasktest.NewContainer()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[cfg.ID] = c
	if cfg.Holds {
		s.sandboxes = append(s.sandboxes, cfg.ID)
	}
	return c, nil
}

func (s *fakeSandbox) Stop(context.Context) error {
	s.end(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	return nil
}

func (s *fakeSandbox) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

func (s *fakeSandbox) container(id string) *tasktest.Container {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.containers[id]
}

// harness is a served service with a client of both APIs.
type harness struct {
	api.TTRPCTaskService
	pod     sandboxapi.TTRPCSandboxService
	t       *testing.T
	sandbox *fakeSandbox
	journal *tasktest.Journal
	conn    *ttrpc.Client
	bundle  string
	served  chan error
	cancel  context.CancelFunc
	left    atomic.Bool // the bundle

	mu sync.Mutex
	// made is what sandboxes were asked for; makeErr is what is answered.
	made    []SandboxConfig
	makeErr error
}

func (h *harness) start(_ context.Context, cfg SandboxConfig) (sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.made = append(h.made, cfg)
	return h.sandbox, h.makeErr
}

func listener(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// newHarness serves the shim of the task "c".
func newHarness(t *testing.T) *harness { return serve(t, Config{ID: "c", Namespace: "ns"}) }

// newPod serves the shim of the pod "pod" by the sandbox API.
func newPod(t *testing.T) *harness { return serve(t, Config{ID: "pod", Namespace: "ns", Hold: true}) }

func serve(t *testing.T, cfg Config, change ...func(*Service)) *harness {
	t.Helper()
	h := &harness{t: t, sandbox: newFakeSandbox(), journal: &tasktest.Journal{}, served: make(chan error, 1)}
	h.bundle = h.newBundle("")
	l := listener(t)
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	cfg.Leave = func() error { h.left.Store(true); return nil }
	s, err := newService(ctx, cfg, h.start, h.journal)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(s)
	}
	go func() {
		h.served <- s.Serve(ctx, l, func() error { return nil })
	}()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h.conn = ttrpc.NewClient(conn)
	h.TTRPCTaskService = api.NewTTRPCTaskClient(h.conn)
	h.pod = sandboxapi.NewTTRPCSandboxClient(h.conn)
	t.Cleanup(func() {
		h.conn.Close() //nolint:errcheck // Serve may have ended
		cancel()
		if err := <-h.served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return h
}

// newBundle makes a bundle whose spec has the annotations, which are JSON.
func (h *harness) newBundle(annotations string) string {
	h.t.Helper()
	dir := h.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"annotations":{`+annotations+`}}`), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// create makes a task that is created.
func (h *harness) create(id string) *tasktest.Container {
	h.t.Helper()
	resp, err := h.Create(h.t.Context(), &api.CreateTaskRequest{ID: id, Bundle: h.bundle})
	if err != nil || resp.Pid != fakePID {
		h.t.Fatalf("create %s: %v, %v", id, resp, err)
	}
	return h.sandbox.container(id)
}

// run makes a task that runs.
func (h *harness) run(id string) *tasktest.Container {
	h.t.Helper()
	c := h.create(id)
	if _, err := h.Start(h.t.Context(), &api.StartRequest{ID: id}); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// wait waits for a process's exit.
func (h *harness) wait(id, exec string) *api.WaitResponse {
	h.t.Helper()
	resp, err := h.Wait(h.t.Context(), &api.WaitRequest{ID: id, ExecID: exec})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp
}

// shutdown ends the shim as containerd does.
func (h *harness) shutdown(id string) {
	h.t.Helper()
	if _, err := h.Shutdown(h.t.Context(), &api.ShutdownRequest{ID: id}); err != nil {
		h.t.Error(err)
	}
	h.conn.Close() //nolint:errcheck // it may have ended
	h.served <- <-h.served
}
