package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// callTimeout bounds one call: it is for what hangs.
const callTimeout = 3 * time.Minute

// call is a context for one call, which ends by itself when ctx does: containerd
// goes on with a pod or its clean-up after a client that has left.
func call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
}

// A pod is one that was run.
type pod struct {
	n        *node
	id, name string
	config   *runtime.PodSandboxConfig
}

// run runs a pod.
func (n *node) run(ctx context.Context, handler string) (*pod, error) {
	n.pods++
	name := fmt.Sprintf("pod%d", n.pods)
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name + "-uid", Namespace: "default"},
		Hostname:     name,
		LogDirectory: filepath.Join(n.d.Dir, "logs", name),
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "/" + n.d.Token,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
			},
		},
	}
	if err := os.MkdirAll(config.LogDirectory, 0o700); err != nil {
		return nil, err
	}
	ctx, cancel := call(ctx)
	defer cancel()
	r, err := n.cri.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", name, err)
	}
	return &pod{n, r.PodSandboxId, name, config}, nil
}

// start creates a container and starts it: it runs when start returns.
func (p *pod) start(ctx context.Context, name string, command ...string) (id string, err error) {
	ctx, cancel := call(ctx)
	defer cancel()
	created, err := p.n.cri.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId:  p.id,
		SandboxConfig: p.config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name},
			Image:    &runtime.ImageSpec{Image: image},
			Command:  command,
			LogPath:  name + ".log",
			Linux: &runtime.LinuxContainerConfig{
				Resources:       &runtime.LinuxContainerResources{},
				SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions},
			},
		},
	})
	if err != nil {
		return "", fmt.Errorf("create container %s of %s: %w", name, p.name, err)
	}
	if _, err := p.n.cri.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return "", fmt.Errorf("start container %s of %s: %w", name, p.name, err)
	}
	return created.ContainerId, nil
}

// address is the pod's, version 4.
func (p *pod) address(ctx context.Context) (string, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	r, err := p.n.cri.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		return "", fmt.Errorf("status of %s: %w", p.name, err)
	}
	return r.GetStatus().GetNetwork().GetIp(), nil
}

// exec runs a command that has to succeed, and decodes what it prints into v,
// unless that is nil.
func (n *node) exec(ctx context.Context, container string, v any, command ...string) error {
	ctx, cancel := call(ctx)
	defer cancel()
	r, err := n.cri.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: container, Cmd: command})
	if err != nil {
		return fmt.Errorf("exec %v: %w", command, err)
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("exec %v: exit code %d: %s", command, r.ExitCode, r.Stderr)
	}
	if v == nil {
		return nil
	}
	if err := json.Unmarshal(r.Stdout, v); err != nil {
		return fmt.Errorf("exec %v: decode its output: %w", command, err)
	}
	return nil
}

// remove stops the pod, and removes it.
func (p *pod) remove(ctx context.Context) error {
	ctx, cancel := call(ctx)
	defer cancel()
	if _, err := p.n.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	if _, err := p.n.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("remove %s: %w", p.name, err)
	}
	return nil
}
