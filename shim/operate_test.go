package shim

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"

	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

func TestTheOperatorOfASandbox(t *testing.T) {
	h := newHarness(t)
	h.run("c")
	operator, ctx := operatorv1.NewOperatorClient(h.conn), t.Context()
	if _, err := operator.Pause(ctx, &operatorv1.PauseRequest{}); err != nil {
		t.Fatal(err)
	}
	got, err := operator.Status(ctx, &operatorv1.StatusRequest{})
	want := &operatorv1.StatusResponse{
		State: operatorv1.StatusResponse_STATE_PAUSED,
		Size:  &operatorv1.Size{Vcpus: 2, MemoryMib: 512}, Maximum: &operatorv1.Size{Vcpus: 4, MemoryMib: 2048},
		Vcpus:      []*operatorv1.VCPU{{Number: 0, Thread: fakePID + 1}, {Number: 1, Thread: fakePID + 2}},
		Placement:  &operatorv1.Placement{Cpus: "0-1", Pinned: true},
		Containers: []*operatorv1.Container{{Id: "c", State: operatorv1.Container_STATE_RUNNING}},
	}
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("got  %v, %v\nwant %v", got, err, want)
	}
	if _, err := operator.Resume(ctx, &operatorv1.ResumeRequest{}); err != nil || h.sandbox.paused.Load() {
		t.Errorf("resume: %v", err)
	}
	if r, err := operator.Reclaim(ctx, &operatorv1.ReclaimRequest{}); err != nil || r.GetBeforeMib() != 300 || r.GetAfterMib() != 200 {
		t.Errorf("reclaim: %v, %v", r, err)
	}
}

// What the operator does to a pod containerd hears of, by the task that stands for it.
func TestContainerdHearsOfTheOperator(t *testing.T) {
	h := newHarness(t)
	h.bundle = h.newBundle(`"io.kubernetes.cri.container-type":"sandbox"`)
	h.run("c")
	operator, ctx := operatorv1.NewOperatorClient(h.conn), t.Context()
	_, perr := operator.Pause(ctx, &operatorv1.PauseRequest{})
	_, rerr := operator.Resume(ctx, &operatorv1.ResumeRequest{})
	if err := errors.Join(perr, rerr); err != nil {
		t.Fatal(err)
	}
	if told := h.journal.Words(); !slices.Equal(told, []string{"create c", "start c", "paused c", "resumed c"}) {
		t.Errorf("told %q", told)
	}
}

func TestTheOperatorOfNoSandboxYet(t *testing.T) {
	h := newPod(t)
	_, err := operatorv1.NewOperatorClient(h.conn).Status(t.Context(), &operatorv1.StatusRequest{})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}
