// Command containerd-shim-husk-v2 is the containerd runtime
// io.containerd.husk.v2: one micro-VM per pod.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/husk-containers/husk/shim"
	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/virtcontainers"
	"github.com/husk-containers/husk/virtcontainers/dialer"
)

func main() {
	if dialer.Is(os.Args) {
		if err := dialer.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	began := time.Now()
	serve := func(ctx context.Context, d *bootstrap.Daemon) error { return serve(ctx, d, began) }
	os.Exit(bootstrap.Program{Name: "io.containerd.husk.v2", Serve: serve, Spawn: virtcontainers.Spawn, Cleanup: virtcontainers.Cleanup}.Run())
}

// serve runs the shim's daemon. The VM boots while containerd is still on its way
// to Create, but for a pod by the sandbox API: what that is made of comes with
// CreateSandbox. began is when the daemon's process did.
func serve(ctx context.Context, d *bootstrap.Daemon, began time.Time) error {
	cfg, err := loadConfig(d)
	if err != nil {
		return err
	}
	publisher, err := events.NewPublisher(d.EventsPath, d.Namespace)
	if err != nil {
		return err
	}
	service, err := shim.New(ctx, shim.Config{
		ID: d.ID, Namespace: d.Namespace, Hold: d.Hold, Events: publisher, Leave: d.Leave,
		Start: func(ctx context.Context, c shim.SandboxConfig) (*virtcontainers.Sandbox, error) {
			return newSandbox(ctx, d, &cfg, c, began)
		},
	})
	if err != nil {
		return err
	}
	return service.Serve(ctx, d.Listener, d.Ready)
}
