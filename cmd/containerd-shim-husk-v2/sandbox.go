package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
	"github.com/husk-containers/husk/shim"
	"github.com/husk-containers/husk/shim/bootstrap"
	"github.com/husk-containers/husk/shim/pod"
	"github.com/husk-containers/husk/virtcontainers"
	"github.com/husk-containers/husk/virtcontainers/cgroup"
	"github.com/husk-containers/husk/virtcontainers/resource"
)

// loadConfig reads the configuration that the daemon is to have.
func loadConfig(d *bootstrap.Daemon) (config.Config, error) {
	cfg, err := config.Load(config.Path(d.ConfigPath))
	if err != nil {
		return config.Config{}, err
	}
	if d.Level.Level() != slog.LevelDebug { // containerd's own wish for more comes first
		d.Level.Set(cfg.Runtime.LogLevel.Level())
	}
	return cfg, nil
}

// newSandbox begins to boot the VM, for the container of the daemon's bundle or for
// a pod by the sandbox API.
func newSandbox(ctx context.Context, d *bootstrap.Daemon, cfg *config.Config, c shim.SandboxConfig, began time.Time) (*virtcontainers.Sandbox, error) {
	o := virtcontainers.Options{
		ID: d.ID, Namespace: d.Namespace, Bundle: d.Bundle, Config: cfg,
		Began: began, Host: d.Host,
		Address: d.Listener.Addr().String(),
	}
	if c.Hold {
		o.Began = time.Time{} // the daemon has waited for this
		if err := ask(&o, c.Pod.Annotations, c.Pod.Resources); err != nil {
			return nil, err
		}
		o.Pod, o.Hostname, o.Sysctls = true, c.Pod.Hostname, c.Pod.Sysctls
		o.CgroupsPath = cgroup.OfPod(c.Pod.CgroupParent, d.ID)
		o.Network.Path, o.Network.Host = c.NetNS, c.NetNS == ""
		if c.Pod.DNS != nil {
			text := c.Pod.DNS.ResolvConf()
			o.ResolvConf = &text
		}
		return virtcontainers.NewSandbox(ctx, o)
	}
	place, err := pod.ReadPlace(d.Bundle, d.ID)
	if err != nil {
		return nil, err
	}
	o.Pod = place.Role == pod.Sandbox
	if o.Spec, err = virtcontainers.ReadSpec(d.Bundle); err != nil {
		return nil, err
	}
	resources, err := pod.ResourcesOf(o.Spec.Annotations)
	if err != nil {
		return nil, err
	}
	if err := ask(&o, o.Spec.Annotations, resources); err != nil {
		return nil, err
	}
	return virtcontainers.NewSandbox(ctx, o)
}

// ask has the options be as a pod asks for: by its annotations, as far as the
// configuration lets them, and by the limits of its containers.
func ask(o *virtcontainers.Options, annotations map[string]string, r pod.Resources) error {
	cfg, err := o.Config.Override(annotations)
	if err != nil {
		return err
	}
	o.Config, o.Hypervisor = &cfg, newHypervisor(cfg.Hypervisor)
	o.Limits = resource.OfPod(r.CPUQuota, r.CPUPeriod, r.MemoryBytes)
	return nil
}

// newHypervisor is the one place that chooses what VMs are run by.
func newHypervisor(c config.Hypervisor) hypervisor.Hypervisor {
	o := qemu.Options{
		Path: c.Path, Accelerator: string(c.Accelerator), Machine: c.Machine, CPUModel: c.CPUModel, User: c.User,
		Virtiofsd: c.Virtiofsd, VirtiofsdCache: string(c.VirtiofsdCache), VirtiofsdThreads: c.VirtiofsdThreads,
		FreePageReporting: c.FreePageReporting, Log: slog.Default(),
	}
	for _, ch := range c.Channels {
		o.Channels = append(o.Channels, string(ch))
	}
	return qemu.New(o)
}
