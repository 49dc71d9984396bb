package operator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

// fake is a sandbox that does as it is told, or fails with err.
type fake struct {
	machine Machine
	threads map[int]int
	err     error
	calls   []string
}

func (f *fake) Machine() Machine { return f.machine }

func (f *fake) VCPUThreads(ctx context.Context) (map[int]int, error) {
	if f.threads == nil { // a monitor that does not answer
		<-ctx.Done()
		return nil, fmt.Errorf("ask the monitor:\n%w", ctx.Err())
	}
	return f.threads, nil
}

func (f *fake) Pause(ctx context.Context) error {
	return f.did(ctx, "pause", func() { f.machine.Paused = true })
}

func (f *fake) Resume(ctx context.Context) error {
	return f.did(ctx, "resume", func() { f.machine.Paused = false })
}

func (f *fake) Reclaim(ctx context.Context) (Reclaimed, error) {
	return Reclaimed{BeforeMiB: 337, AfterMiB: 229}, f.did(ctx, "reclaim", func() {})
}

func (f *fake) did(ctx context.Context, what string, f2 func()) error {
	if _, bounded := ctx.Deadline(); !bounded {
		return errors.New("a call without a deadline")
	}
	f.calls = append(f.calls, what)
	if f.err == nil {
		f2()
	}
	return f.err
}

// serve serves on a unix socket, and returns a client of it.
func serve(t *testing.T, s *Service) operatorv1.OperatorService {
	t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	s.Register(server)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(t.Context()), l) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() {
		if err := errors.Join(client.Close(), server.Close()); err != nil {
			t.Error(err)
		}
		if err := <-served; !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Error(err)
		}
	})
	return operatorv1.NewOperatorClient(client)
}

func of(f *fake, containers ...Container) *Service {
	return New(func() (Sandbox, error) { return f, nil }, func() []Container { return containers })
}

func TestStatus(t *testing.T) {
	f := &fake{
		machine: Machine{
			VCPUs: 2, MemoryMiB: 512, MaxVCPUs: 4, MaxMemoryMiB: 2048, Paused: true, Accelerator: "tcg",
			CPUs: "2-3", MemoryNodes: "0", Pinned: true,
		},
		threads: map[int]int{1: 4712, 0: 4711},
	}
	client := serve(t, of(f, Container{"b", Stopped}, Container{"a", Running}))
	got, err := client.Status(t.Context(), &operatorv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &operatorv1.StatusResponse{
		State: operatorv1.StatusResponse_STATE_PAUSED, Accelerator: "tcg",
		Size: &operatorv1.Size{Vcpus: 2, MemoryMib: 512}, Maximum: &operatorv1.Size{Vcpus: 4, MemoryMib: 2048},
		Vcpus:     []*operatorv1.VCPU{{Number: 0, Thread: 4711}, {Number: 1, Thread: 4712}},
		Placement: &operatorv1.Placement{Cpus: "2-3", MemoryNodes: "0", Pinned: true},
		Containers: []*operatorv1.Container{
			{Id: "a", State: operatorv1.Container_STATE_RUNNING}, {Id: "b", State: operatorv1.Container_STATE_STOPPED},
		},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
}

// A state of ours is the wire's of the same name.
func TestStatesOfContainers(t *testing.T) {
	for state, name := range map[State]string{Created: "CREATED", Running: "RUNNING", Paused: "PAUSED", Stopped: "STOPPED"} {
		if got := operatorv1.Container_State(state).String(); got != "STATE_"+name {
			t.Errorf("%s is %s", name, got)
		}
	}
}

func TestStatusOfAMonitorThatDoesNotAnswer(t *testing.T) {
	client := serve(t, of(&fake{machine: Machine{VCPUs: 1, MemoryMiB: 256}}))
	got, err := client.Status(t.Context(), &operatorv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetSize().GetMemoryMib() != 256 || len(got.GetUnknown()) != 1 ||
		got.GetUnknown()[0] != "threads of the vCPUs: ask the monitor:; context deadline exceeded" {
		t.Errorf("got %v", got)
	}
}

func TestActions(t *testing.T) {
	f := &fake{}
	client := serve(t, of(f))
	if _, err := client.Pause(t.Context(), &operatorv1.PauseRequest{}); err != nil || !f.machine.Paused {
		t.Errorf("pause: %v, %+v", err, f.machine)
	}
	_, err := client.Reclaim(t.Context(), &operatorv1.ReclaimRequest{})
	if err = errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the sandbox is paused, and its guest cannot give any back: resume it first") {
		t.Errorf("reclaim of a paused sandbox: %v", err)
	}
	if _, err := client.Resume(t.Context(), &operatorv1.ResumeRequest{}); err != nil || f.machine.Paused {
		t.Errorf("resume: %v, %+v", err, f.machine)
	}
	got, err := client.Reclaim(t.Context(), &operatorv1.ReclaimRequest{})
	if err != nil || got.GetBeforeMib() != 337 || got.GetAfterMib() != 229 {
		t.Errorf("reclaim: %v, %v", got, err)
	}
	if calls := strings.Join(f.calls, " "); calls != "pause resume reclaim" {
		t.Errorf("the sandbox was asked to %s", calls)
	}
}

func TestErrorsKeepTheirClass(t *testing.T) {
	f := &fake{err: fmt.Errorf("no balloon\nhere: %w", errdefs.ErrNotImplemented)}
	none := New(func() (Sandbox, error) { return nil, fmt.Errorf("not created yet: %w", errdefs.ErrUnavailable) }, func() []Container { return nil })
	broken, absent := serve(t, of(f)), serve(t, none)
	ctx := t.Context()
	for _, tt := range []struct {
		name, want string
		class      func(error) bool
		call       func() error
	}{
		{"reclaim", "no balloon; here", errdefs.IsNotImplemented, func() error { _, err := broken.Reclaim(ctx, &operatorv1.ReclaimRequest{}); return err }},
		{"pause", "no balloon; here", errdefs.IsNotImplemented, func() error { _, err := broken.Pause(ctx, &operatorv1.PauseRequest{}); return err }},
		{"resume", "no balloon; here", errdefs.IsNotImplemented, func() error { _, err := broken.Resume(ctx, &operatorv1.ResumeRequest{}); return err }},
		{"status of none", "not created yet", errdefs.IsUnavailable, func() error { _, err := absent.Status(ctx, &operatorv1.StatusRequest{}); return err }},
		{"reclaim of none", "not created yet", errdefs.IsUnavailable, func() error { _, err := absent.Reclaim(ctx, &operatorv1.ReclaimRequest{}); return err }},
		{"pause of none", "not created yet", errdefs.IsUnavailable, func() error { _, err := absent.Pause(ctx, &operatorv1.PauseRequest{}); return err }},
	} {
		if err := errgrpc.ToNative(tt.call()); !tt.class(err) || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}
