package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

const mtu = 1500

// network is CNI's configuration of the pods' network.
var network = fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "{token}-cni0", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": %d,
  "ipam": {"type": "host-local", "dataDir": "{dir}/addresses",
    "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, mtu)

// image is busybox with the program peer in it.
const image = "example.test/peer:latest"

// pollInterval is for CRI's readiness, which nobody tells of.
const pollInterval = 20 * time.Millisecond

// A node is a containerd that serves CRI.
type node struct {
	d        *daemon.Daemon
	handlers []string // the one under test first, then runc
	conn     *grpc.ClientConn
	cri      runtime.RuntimeServiceClient
	pods     int // so far, for names
}

// connect returns when CRI serves and has the image with the program at peer.
func (n *node) connect(ctx context.Context, peer string) (err error) {
	if err := n.importPeer(ctx, peer); err != nil {
		return err
	}
	n.conn, err = grpc.NewClient("unix://"+n.d.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to CRI: %w", err)
	}
	n.cri = runtime.NewRuntimeServiceClient(n.conn)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := n.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for CRI: %w", err)
		}
	}
}

func (n *node) ready(ctx context.Context) error {
	status, err := n.cri.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range status.Status.Conditions {
		if !c.Status && (c.Type == runtime.RuntimeReady || c.Type == runtime.NetworkReady) {
			return fmt.Errorf("%s: %s: %s", c.Type, c.Reason, c.Message)
		}
	}
	for _, name := range []string{images.Pause, image} {
		r, err := runtime.NewImageServiceClient(n.conn).ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: name}})
		if err != nil {
			return err
		}
		if r.Image == nil {
			return fmt.Errorf("image %s is not there", name)
		}
	}
	return nil
}

func (n *node) importPeer(ctx context.Context, path string) error {
	program, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the pods' program: %w; make bench builds it", err)
	}
	files, err := images.BusyboxRoot()
	if err != nil {
		return err
	}
	archive := filepath.Join(n.d.Dir, "peer.tar")
	f, err := os.Create(archive)
	if err != nil {
		return fmt.Errorf("create image archive: %w", err)
	}
	defer os.Remove(archive)
	err = images.WriteArchive(f, image, append(files, images.File{Name: "bin/peer", Data: program, Mode: 0o755}))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write image archive: %w", err)
	}
	if out, err := n.d.Ctr(ctx, "image", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("import image: %w: %s", err, out)
	}
	return nil
}

// close removes the pods that are left and ends containerd. What stays behind
// is an error.
func (n *node) close(ctx context.Context) error {
	var err error
	if n.conn != nil {
		err = errors.Join(n.removeAll(ctx), n.conn.Close())
	}
	ctx, cancel := call(ctx)
	defer cancel()
	leftovers, closeErr := n.d.Close(ctx)
	err = errors.Join(err, closeErr)
	if len(leftovers) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(leftovers, "; ")))
	}
	return err
}

func (n *node) removeAll(ctx context.Context) error {
	list, err := n.cri.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	for _, p := range list.Items {
		left := pod{n: n, id: p.Id, name: p.GetMetadata().GetName()}
		err = errors.Join(err, left.remove(ctx))
	}
	return err
}
