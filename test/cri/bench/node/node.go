// Package node runs a private containerd that serves CRI, with one CNI network, for
// programs that measure pods of Husk beside pods of runc.
package node

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
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

// peerImage is busybox with the program peer in it.
const peerImage = "example.test/peer:latest"

// pollInterval is for CRI's readiness, which nobody tells of.
const pollInterval = 20 * time.Millisecond

// Runc is the handler that Husk's is compared with.
const Runc = "runc"

// Options are how a node runs.
type Options struct {
	Generation string // of containerd
	Scratch    string
	Handler    string // under test
	// Peer is a program that the containers have as "peer"; empty: none.
	Peer string
}

// Register has the options be flags, all but Peer.
func (o *Options) Register(flags *flag.FlagSet) {
	flags.StringVar(&o.Generation, "containerd", "1.6", "`generation` of containerd: 1.6 or 2.4")
	flags.StringVar(&o.Scratch, "scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
	flags.StringVar(&o.Handler, "handler", "husk", "CRI `runtime handler` under test: husk, or husk-shim of containerd 2.4")
}

// A Node is a containerd that serves CRI.
type Node struct {
	Daemon   *daemon.Daemon
	CRI      runtime.RuntimeServiceClient
	Handlers []string // the one under test first, then runc
	Root     string   // the repository's

	conn  *grpc.ClientConn
	image string // of containers
	pods  int    // so far, for names
}

// Main is a program's: it has measure print under a title what it finds on a node, until
// a signal comes. The working directory is the repository's root. An error ends the
// program.
func Main(o Options, title string, measure func(context.Context, *Node, io.Writer) error) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := with(ctx, o, func(n *Node) error {
		fmt.Printf("## %s\n\nBy CRI, handlers %s, one network: the CNI plugin bridge, MTU %d.\n\n", title, strings.Join(n.Handlers, " and "), mtu)
		return measure(ctx, n, os.Stdout)
	}); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func with(ctx context.Context, o Options, do func(*Node) error) (err error) {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	g, err := daemon.Lookup(root, o.Generation)
	if err != nil {
		return err
	}
	d, err := daemon.Start(ctx, daemon.Config{Generation: g, Root: root, Scratch: o.Scratch, CRI: &daemon.CRI{Networks: []string{network}}})
	if err != nil {
		return err
	}
	n := &Node{Daemon: d, Handlers: []string{o.Handler, Runc}, Root: root, image: images.Busybox}
	defer func() { err = errors.Join(err, n.close(context.WithoutCancel(ctx))) }()
	if o.Peer != "" {
		n.image = peerImage
		if err := n.importPeer(ctx, o.Peer); err != nil {
			return err
		}
	}
	if err := n.connect(ctx); err != nil {
		return err
	}
	if err := do(n); err != nil {
		return fmt.Errorf("%w; containerd's log ends:\n%s", err, d.Log(20))
	}
	return nil
}

// connect returns when CRI serves and has the images.
func (n *Node) connect(ctx context.Context) (err error) {
	n.conn, err = grpc.NewClient("unix://"+n.Daemon.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("connect to CRI: %w", err)
	}
	n.CRI = runtime.NewRuntimeServiceClient(n.conn)
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

func (n *Node) ready(ctx context.Context) error {
	status, err := n.CRI.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range status.Status.Conditions {
		if !c.Status && (c.Type == runtime.RuntimeReady || c.Type == runtime.NetworkReady) {
			return fmt.Errorf("%s: %s: %s", c.Type, c.Reason, c.Message)
		}
	}
	for _, name := range []string{images.Pause, n.image} {
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

func (n *Node) importPeer(ctx context.Context, path string) error {
	program, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the pods' program: %w; make bench builds it", err)
	}
	files, err := images.BusyboxRoot()
	if err != nil {
		return err
	}
	archive := filepath.Join(n.Daemon.Dir, "peer.tar")
	f, err := os.Create(archive)
	if err != nil {
		return fmt.Errorf("create image archive: %w", err)
	}
	defer os.Remove(archive)
	err = images.WriteArchive(f, peerImage, append(files, images.File{Name: "bin/peer", Data: program, Mode: 0o755}))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write image archive: %w", err)
	}
	if out, err := n.Daemon.Ctr(ctx, "image", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("import image: %w: %s", err, out)
	}
	return nil
}

// close removes the pods that are left and ends containerd. What stays behind
// is an error.
func (n *Node) close(ctx context.Context) error {
	var err error
	if n.conn != nil {
		err = errors.Join(n.RemoveAll(ctx), n.conn.Close())
	}
	ctx, cancel := Call(ctx)
	defer cancel()
	leftovers, closeErr := n.Daemon.Close(ctx)
	err = errors.Join(err, closeErr)
	if len(leftovers) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(leftovers, "; ")))
	}
	return err
}

// RemoveAll removes all pods that there are.
func (n *Node) RemoveAll(ctx context.Context) error {
	list, err := n.CRI.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	for _, p := range list.Items {
		left := Pod{Node: n, ID: p.Id, Name: p.GetMetadata().GetName()}
		err = errors.Join(err, left.Remove(ctx))
	}
	return err
}
