package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/virtcontainers"
)

// newSandbox begins to boot the VM for the container of the daemon's bundle.
func newSandbox(ctx context.Context, d *bootstrap.Daemon, began time.Time) (*virtcontainers.Sandbox, error) {
	cfg, err := config.Load(config.Path(d.ConfigPath))
	if err != nil {
		return nil, err
	}
	if d.Level.Level() != slog.LevelDebug { // containerd's own wish for more comes first
		d.Level.Set(cfg.Runtime.LogLevel.Level())
	}
	spec, err := virtcontainers.ReadSpec(d.Bundle)
	if err != nil {
		return nil, err
	}
	return virtcontainers.NewSandbox(ctx, virtcontainers.Options{
		ID: d.ID, Namespace: d.Namespace, Bundle: d.Bundle, Spec: spec, Config: &cfg,
		Hypervisor: newHypervisor(cfg.Hypervisor), Began: began, Clone: d.Host.Clone,
	})
}

// newHypervisor is the one place that chooses what VMs are run by.
func newHypervisor(c config.Hypervisor) hypervisor.Hypervisor {
	o := qemu.Options{
		Path: c.Path, Accelerator: string(c.Accelerator), Machine: c.Machine, CPUModel: c.CPUModel, User: c.User,
		Virtiofsd: c.Virtiofsd, VirtiofsdCache: string(c.VirtiofsdCache), Log: slog.Default(),
	}
	for _, ch := range c.Channels {
		o.Channels = append(o.Channels, string(ch))
	}
	return qemu.New(o)
}
