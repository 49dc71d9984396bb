package path_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	containerdevents "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/husk-containers/husk/agent"
	"github.com/husk-containers/husk/agent/agenttest"
	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/protocols/stream"
	"github.com/husk-containers/husk/shim"
	"github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/virtcontainers"
)

// wait bounds every wait of a test; only a broken one meets it.
const wait = 60 * time.Second

// A host is one shim that serves one sandbox, and containerd's side of it.
type host struct {
	taskapi.TTRPCTaskService
	t       *testing.T
	config  config.Config
	bundle  string
	sandbox *virtcontainers.Sandbox
	runtime *agenttest.Runtime
	vm      chan *hypertest.VM
	// resources of the spec.
	resources *specs.LinuxResources
	served    chan error
	client    *ttrpc.Client

	mu     sync.Mutex
	told   []string
	telled chan struct{} // a token after each event
}

// recording remembers the VM, for tests that end it.
type recording struct {
	hypertest.Loopback
	vm chan *hypertest.VM
}

func (r *recording) Start(ctx context.Context, cfg hypervisor.Config) (hypervisor.VM, error) {
	vm, err := r.Loopback.Start(ctx, cfg)
	if err == nil {
		r.vm <- vm.(*hypertest.VM)
	}
	return vm, err
}

// guest is the real agent over a runtime of plain processes.
func (h *host) guest(ctx context.Context, g *hypertest.GuestEnd) error {
	share := g.Config.Devices[0].(hypervisor.Share).Dir
	h.runtime = agenttest.NewRuntime(agenttest.ShareRoot(share))
	streams, err := g.Listen(stream.Port)
	if err != nil {
		return err
	}
	copied, err := g.Listen(files.Port)
	if err != nil {
		return err
	}
	control, err := g.DialControl(ctx)
	if err != nil {
		return err
	}
	return agent.New(agent.Options{
		Version: "test", Started: agent.Uptime(), Runtime: h.runtime,
		Platform: &agenttest.Platform{}, Streams: streams, Files: copied,
	}).Serve(ctx, control)
}

// newHost starts a shim for the container "c" that runs command. What change
// alters of the defaults is in force from the start.
func newHost(t *testing.T, terminal bool, command []string, change func(*host, *hypertest.Loopback)) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, config: config.Default(), bundle: filepath.Join(dir, "bundle"), vm: make(chan *hypertest.VM, 1), served: make(chan error, 1), telled: make(chan struct{}, 1)}
	h.config.Runtime.StateDir = filepath.Join(dir, "run")
	hv := &recording{vm: h.vm}
	hv.Guest = h.guest
	if change != nil {
		change(h, &hv.Loopback)
	}
	if err := os.MkdirAll(filepath.Join(h.bundle, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Terminal: terminal, Args: command, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}},
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, Resources: h.resources},
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.bundle, "config.json"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	publisher, err := events.NewPublisher(h.listenForEvents(filepath.Join(dir, "e")), "ns")
	if err != nil {
		t.Fatal(err)
	}
	h.sandbox, err = virtcontainers.NewSandbox(t.Context(), virtcontainers.Options{
		ID: "c", Namespace: "ns", Bundle: h.bundle, Spec: spec, Config: &h.config, Hypervisor: hv,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	service, err := shim.New(ctx, shim.Config{
		ID: "c", Namespace: "ns", Events: publisher, Leave: func() error { return nil },
		Start: func(context.Context, shim.SandboxConfig) (*virtcontainers.Sandbox, error) { return h.sandbox, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { h.served <- service.Serve(ctx, l, func() error { return nil }) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h.client = ttrpc.NewClient(conn)
	h.TTRPCTaskService = taskapi.NewTTRPCTaskClient(h.client)
	t.Cleanup(func() {
		h.client.Close() //nolint:errcheck // it may have ended
		cancel()
		select {
		case err := <-h.served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(wait):
			t.Error("Serve does not end")
		}
		h.nothingLeft()
	})
	return h
}

// nothingLeft checks that the sandbox has gone without a trace.
func (h *host) nothingLeft() {
	h.t.Helper()
	left, err := filepath.Glob(filepath.Join(h.config.Runtime.StateDir, "*"))
	if err != nil || len(left) > 0 {
		h.t.Errorf("left in the state directory: %v, %v", left, err)
	}
	if _, err := os.Lstat(filepath.Join(h.bundle, "husk.json")); !errors.Is(err, os.ErrNotExist) {
		h.t.Errorf("the clean-up record is left: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), h.config.Runtime.StateDir) {
		h.t.Errorf("mounts are left: %v\n%s", err, mounts)
	}
}

// listenForEvents is containerd's event service.
func (h *host) listenForEvents(path string) string {
	l, err := net.Listen("unix", path)
	if err != nil {
		h.t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		h.t.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(srv, eventSink{h})
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(context.Background(), l) //nolint:errcheck // ends by Close
	}()
	h.t.Cleanup(func() {
		srv.Close() //nolint:errcheck // nothing is lost
		<-done
	})
	return path
}

type eventSink struct{ h *host }

func (s eventSink) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	v, err := typeurl.UnmarshalAny(r.Envelope.Event)
	if err != nil {
		return nil, err
	}
	var word string
	switch e := v.(type) {
	case *containerdevents.TaskCreate:
		word = "create"
	case *containerdevents.TaskStart:
		word = "start"
	case *containerdevents.TaskExecAdded:
		word = "exec-added " + e.ExecID
	case *containerdevents.TaskExecStarted:
		word = "exec-started " + e.ExecID
	case *containerdevents.TaskExit:
		word = fmt.Sprintf("exit %s %d", e.ID, e.ExitStatus)
	case *containerdevents.TaskDelete:
		word = "delete"
	case *containerdevents.TaskOOM:
		word = "oom"
	case *containerdevents.TaskPaused:
		word = "paused"
	case *containerdevents.TaskResumed:
		word = "resumed"
	}
	s.h.mu.Lock()
	s.h.told = append(s.h.told, word)
	s.h.mu.Unlock()
	select {
	case s.h.telled <- struct{}{}:
	default:
	}
	return &emptypb.Empty{}, nil
}

// expectEvents waits until containerd was told of exactly these, in order.
func (h *host) expectEvents(want ...string) {
	h.t.Helper()
	h.awaitEvents(fmt.Sprintf("%q", want), func(got []string) bool { return slices.Equal(got, want) })
}

// expectLast waits until this is the last that containerd was told of.
func (h *host) expectLast(want string) {
	h.t.Helper()
	h.awaitEvents("that end in "+want, func(got []string) bool { return len(got) > 0 && got[len(got)-1] == want })
}

func (h *host) awaitEvents(want string, satisfied func([]string) bool) {
	h.t.Helper()
	deadline := time.After(wait)
	for {
		h.mu.Lock()
		got := slices.Clone(h.told)
		h.mu.Unlock()
		if satisfied(got) {
			return
		}
		select {
		case <-h.telled:
		case <-deadline:
			h.t.Fatalf("events %q, want %s", got, want)
		}
	}
}

// A client holds the client's ends of a process's FIFOs.
type client struct {
	stdin, stdout, stderr string
	in                    *os.File
	out                   chan []byte // all of stdout, at its end
}

// newClient makes FIFOs and begins to read.
func (h *host) newClient(stdin bool) *client {
	h.t.Helper()
	dir := h.t.TempDir()
	c := &client{stdout: filepath.Join(dir, "out"), out: make(chan []byte, 1)}
	names := []string{c.stdout}
	if stdin {
		c.stdin = filepath.Join(dir, "in")
		names = append(names, c.stdin)
	}
	for _, n := range names {
		if err := unix.Mkfifo(n, 0o600); err != nil {
			h.t.Fatal(err)
		}
	}
	go func() {
		r, err := os.Open(c.stdout) // waits for the writer
		if err != nil {
			c.out <- nil
			return
		}
		defer r.Close() //nolint:errcheck // read to its end
		b, _ := io.ReadAll(r)
		c.out <- b
	}()
	if stdin {
		var err error
		if c.in, err = os.OpenFile(c.stdin, os.O_RDWR, 0); err != nil { // does not wait for the reader
			h.t.Fatal(err)
		}
	}
	return c
}

func (h *host) output(c *client) string {
	h.t.Helper()
	select {
	case b := <-c.out:
		return string(b)
	case <-time.After(wait):
		h.t.Fatal("the output does not end")
		return ""
	}
}

func (h *host) create(c *client, terminal bool) error {
	r := &taskapi.CreateTaskRequest{ID: "c", Bundle: h.bundle, Terminal: terminal}
	if c != nil {
		r.Stdin, r.Stdout, r.Stderr = c.stdin, c.stdout, c.stderr
	}
	_, err := h.Create(h.t.Context(), r)
	return err
}

// run creates and starts the container.
func (h *host) run(c *client, terminal bool) {
	h.t.Helper()
	if err := h.create(c, terminal); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.Start(h.t.Context(), &taskapi.StartRequest{ID: "c"}); err != nil {
		h.t.Fatal(err)
	}
}

// exec starts one more process.
func (h *host) exec(id string, c *client, args ...string) {
	h.t.Helper()
	if err := h.tryExec(id, c, args...); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.Start(h.t.Context(), &taskapi.StartRequest{ID: "c", ExecID: id}); err != nil {
		h.t.Fatal(err)
	}
}

// tryExec adds one more process.
func (h *host) tryExec(id string, c *client, args ...string) error {
	raw, err := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}})
	if err != nil {
		return err
	}
	r := &taskapi.ExecProcessRequest{ID: "c", ExecID: id, Spec: &anypb.Any{Value: raw}}
	if c != nil {
		r.Stdin, r.Stdout, r.Stderr = c.stdin, c.stdout, c.stderr
	}
	_, err = h.Exec(h.t.Context(), r)
	return err
}

// exited waits for a process and returns its status.
func (h *host) exited(exec string) uint32 {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), wait)
	defer cancel()
	r, err := h.Wait(ctx, &taskapi.WaitRequest{ID: "c", ExecID: exec})
	if err != nil {
		h.t.Fatalf("wait for %q: %v", exec, err)
	}
	return r.ExitStatus
}

func (h *host) remove() {
	h.t.Helper()
	if _, err := h.Delete(h.t.Context(), &taskapi.DeleteRequest{ID: "c"}); err != nil {
		h.t.Fatal(err)
	}
}
