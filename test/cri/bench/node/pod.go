package node

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

// Call is a context for one call, which ends by itself when ctx does: containerd
// goes on with a pod or its clean-up after a client that has left.
func Call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
}

// A Pod is one that was run.
type Pod struct {
	Node       *Node
	ID, Name   string
	VM         bool     // whether it is a virtual machine
	Containers []string // ids, in the order of their starts

	vmm    int // QEMU's process id, once it was asked for
	config *runtime.PodSandboxConfig
	limits *runtime.LinuxContainerResources // of each of its containers
}

// Limits are what a kubelet has of thousandths of a CPU and of MiB; 0 is none.
func Limits(milliCPU, mib int64) *runtime.LinuxContainerResources {
	const period = 100_000 // µs, a kubelet's
	return &runtime.LinuxContainerResources{
		CpuPeriod: period, CpuQuota: milliCPU * period / 1000, CpuShares: max(2, milliCPU*1024/1000),
		MemoryLimitInBytes: mib << 20,
	}
}

// Run runs a pod without limits.
func (n *Node) Run(ctx context.Context, handler string) (*Pod, error) {
	return n.RunLimited(ctx, handler, nil)
}

// RunLimited runs a pod that is for one container with these limits; nil: for any
// number without.
func (n *Node) RunLimited(ctx context.Context, handler string, limits *runtime.LinuxContainerResources) (*Pod, error) {
	n.pods++
	name := fmt.Sprintf("pod%d", n.pods)
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name + "-uid", Namespace: "default"},
		Hostname:     name,
		LogDirectory: filepath.Join(n.Daemon.Dir, "logs", name),
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "/" + n.Daemon.Token,
			Resources:    limits,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
			},
		},
	}
	if err := os.MkdirAll(config.LogDirectory, 0o700); err != nil {
		return nil, err
	}
	ctx, cancel := Call(ctx)
	defer cancel()
	r, err := n.CRI.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", name, err)
	}
	return &Pod{Node: n, ID: r.PodSandboxId, Name: name, VM: handler != Runc, config: config, limits: limits}, nil
}

// Start creates a container and starts it: it runs when start returns.
func (p *Pod) Start(ctx context.Context, name string, command ...string) (id string, err error) {
	ctx, cancel := Call(ctx)
	defer cancel()
	limits := p.limits
	if limits == nil {
		limits = &runtime.LinuxContainerResources{}
	}
	created, err := p.Node.CRI.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId:  p.ID,
		SandboxConfig: p.config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name},
			Image:    &runtime.ImageSpec{Image: p.Node.image},
			Command:  command,
			LogPath:  name + ".log",
			Linux: &runtime.LinuxContainerConfig{
				Resources:       limits,
				SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions},
			},
		},
	})
	if err != nil {
		return "", fmt.Errorf("create container %s of %s: %w", name, p.Name, err)
	}
	if _, err := p.Node.CRI.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return "", fmt.Errorf("start container %s of %s: %w", name, p.Name, err)
	}
	p.Containers = append(p.Containers, created.ContainerId)
	return created.ContainerId, nil
}

// Address is the pod's, version 4.
func (p *Pod) Address(ctx context.Context) (string, error) {
	ctx, cancel := Call(ctx)
	defer cancel()
	r, err := p.Node.CRI.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		return "", fmt.Errorf("status of %s: %w", p.Name, err)
	}
	return r.GetStatus().GetNetwork().GetIp(), nil
}

// Exec runs a command that has to succeed, and decodes what it prints into v,
// unless that is nil.
func (n *Node) Exec(ctx context.Context, container string, v any, command ...string) error {
	out, err := n.Output(ctx, container, command...)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal(out, v); err != nil {
		return fmt.Errorf("exec %v: decode its output: %w", command, err)
	}
	return nil
}

// Output runs a command that has to succeed, and returns what it prints.
func (n *Node) Output(ctx context.Context, container string, command ...string) ([]byte, error) {
	ctx, cancel := Call(ctx)
	defer cancel()
	r, err := n.CRI.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: container, Cmd: command})
	if err != nil {
		return nil, fmt.Errorf("exec %v: %w", command, err)
	}
	if r.ExitCode != 0 {
		return nil, fmt.Errorf("exec %v: exit code %d: %s", command, r.ExitCode, r.Stderr)
	}
	return r.Stdout, nil
}

// Remove stops the pod, and removes it.
func (p *Pod) Remove(ctx context.Context) error {
	ctx, cancel := Call(ctx)
	defer cancel()
	if _, err := p.Node.CRI.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("stop %s: %w", p.Name, err)
	}
	if _, err := p.Node.CRI.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("remove %s: %w", p.Name, err)
	}
	return nil
}
