package shim

import (
	"context"
	"io"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	types "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	"github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
)

// copyOut begins to copy out of a task's container.
func (h *harness) copyOut(ctx context.Context, id, path string) (io.Reader, chan error) {
	h.t.Helper()
	stream, err := proxy.NewStreamCreator(h.conn).Create(ctx, path)
	if err != nil {
		h.t.Fatal(err)
	}
	from, err := typeurl.MarshalAnyToProto(&types.ContainerPath{ContainerID: id, Path: path})
	if err != nil {
		h.t.Fatal(err)
	}
	to, err := typeurl.MarshalAnyToProto(&types.WriteStream{Stream: path})
	if err != nil {
		h.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := transferapi.NewTTRPCTransferClient(h.conn).Transfer(ctx, &transferapi.TransferRequest{Source: from, Destination: to})
		done <- errgrpc.ToNative(err)
	}()
	return streaming.ReadByteStream(ctx, stream), done
}

// The transfer service is the same server's, and knows containers by their tasks.
func TestCopyOutOfATask(t *testing.T) {
	h := newHarness(t)
	h.run("c")
	r, done := h.copyOut(t.Context(), "c", "a path")
	if got, err := io.ReadAll(r); err != nil || string(got) != "a path" {
		t.Errorf("received %q, %v", got, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	_, done = h.copyOut(t.Context(), "other", "another path")
	if err := <-done; !errdefs.IsNotFound(err) {
		t.Errorf("of no task: %v", err)
	}
}

// What is still being copied ends with the sandbox, and does not keep the shim.
func TestShutdownEndsCopies(t *testing.T) {
	h := newPod(t)
	h.must(h.createPod(), h.startPod())
	h.run("c")
	r, done := h.copyOut(t.Context(), "c", "forever")
	if _, err := io.ReadFull(r, make([]byte, len("forever"))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.pod.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errdefs.IsUnavailable(err) {
		t.Errorf("the copy ended with %v", err)
	}
	if _, err := r.Read(make([]byte, 1)); !errdefs.IsUnavailable(err) {
		t.Errorf("its stream ended with %v", err)
	}
}
