package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

// callTimeout bounds one call. It is for what hangs: on a busy machine without
// KVM a pod may take most of a minute to start.
const callTimeout = 3 * time.Minute

// patience is by how much limits of time are longer than they are written.
func patience() time.Duration {
	if *smokeFlag {
		return 4
	}
	return 1
}

// An env is one test's private containerd with the handler under test.
type env struct {
	*testing.T
	d       *daemon.Daemon
	handler string
	// generation of containerd, as -containerd names it.
	generation string
	cri        runtime.RuntimeServiceClient
	images     runtime.ImageServiceClient
	logs       string   // the directory that pods' logs are in
	ids        []string // of all pods that were made
}

func newEnv(t *testing.T, root string, g daemon.Generation, handler string, s setup) *env {
	t.Helper()
	plugin, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if s.networks == nil {
		s.networks = []string{bridge("cni0", 1400, subnet4, subnet6)}
	}
	d, err := daemon.Start(t.Context(), daemon.Config{
		Generation: g, Scratch: *scratchFlag, Root: root,
		CRI: &daemon.CRI{Networks: s.networks, Plugins: map[string]string{pluginName: plugin}},
	})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{T: t, d: d, handler: handler, generation: g.Name, logs: filepath.Join(d.Dir, "logs")}
	var conn *grpc.ClientConn
	t.Cleanup(func() {
		e.close()
		if conn != nil {
			conn.Close()
		}
	})
	if *smokeFlag {
		e.configure(daemon.Settings{"runtime": {"boot_timeout": "5m"}})
	}
	conn, err = grpc.NewClient("unix://"+d.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	e.cri, e.images = runtime.NewRuntimeServiceClient(conn), runtime.NewImageServiceClient(conn)
	e.ready()
	return e
}

// ready waits until CRI serves and its network is set up. There is no event:
// CRI reads the configuration in the background.
func (e *env) ready() {
	e.Helper()
	e.eventually("CRI is ready", func(ctx context.Context) error {
		status, err := e.cri.Status(ctx, &runtime.StatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range status.Status.Conditions {
			if !c.Status && c.Type != "ContainerdHasNoDeprecationWarnings" {
				return fmt.Errorf("%s: %s: %s", c.Type, c.Reason, c.Message)
			}
		}
		image, err := e.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: images.Pause}})
		if err == nil && image.Image == nil {
			err = fmt.Errorf("image %s is not there", images.Pause)
		}
		return err
	})
}

// eventually asks again and again until there is no error: for facts that
// nobody tells of.
func (e *env) eventually(what string, ask func(context.Context) error) {
	e.Helper()
	e.within(callTimeout, what, ask)
}

// within is eventually with a limit that is part of what is tested.
func (e *env) within(limit time.Duration, what string, ask func(context.Context) error) {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), limit*patience())
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// One that began in time may end after it.
		err := ask(context.WithoutCancel(ctx))
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			e.Fatalf("%s: not in %v: %v", what, limit*patience(), err)
		}
	}
}

// call is a context for one call.
func (e *env) call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(e.Context()), callTimeout*patience())
}

// close removes the pods that are left and looks for what stays behind.
func (e *env) close() {
	failed := e.Failed()
	if err := e.removeAll(); err != nil {
		e.Errorf("remove pods: %v", err)
	}
	for _, id := range e.ids { // the library's own loopback network is named for them alone
		paths, _ := filepath.Glob("/var/lib/cni/*/*" + id + "*") // the pattern is well-formed
		for _, path := range paths {
			e.Errorf("leftover file: %s", path)
			os.Remove(path) // it is outside all that is removed as a whole
		}
	}
	for _, link := range e.podLinks() {
		e.Errorf("leftover link in the node's namespace: %s", link)
	}
	if failed || e.Failed() {
		e.Logf("end of containerd's log:\n%s", e.d.Log(60))
	}
	ctx, cancel := e.call()
	defer cancel()
	leftovers, err := e.d.Close(ctx)
	if err != nil {
		e.Errorf("tear down: %v", err)
	}
	for _, l := range leftovers {
		e.Errorf("leftover %s", l)
	}
}

// removeAll stops and removes all pods.
func (e *env) removeAll() error {
	ctx, cancel := e.call()
	defer cancel()
	if e.cri == nil {
		return nil
	}
	list, err := e.cri.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range list.Items {
		if _, err := e.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return err
		}
		if _, err := e.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			return err
		}
	}
	return nil
}

// isHusk is whether pods are virtual machines.
func (e *env) isHusk() bool { return strings.HasPrefix(e.handler, "husk") }

// processes lists those of the daemon whose name begins with prefix.
func (e *env) processes(prefix string) []daemon.Process {
	e.Helper()
	list, err := e.d.Processes()
	if err != nil {
		e.Fatal(err)
	}
	return slices.DeleteFunc(list, func(p daemon.Process) bool { return !strings.HasPrefix(p.Name, prefix) })
}

// settled waits until nothing of a pod runs.
func (e *env) settled() {
	e.Helper()
	e.eventually("all processes have ended", func(context.Context) error {
		if left := e.processes(""); len(left) > 0 {
			return fmt.Errorf("still there: %v", left)
		}
		return nil
	})
}
