package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/images"
)

// A pod is one that was run.
type pod struct {
	e      *env
	id     string
	config *runtime.PodSandboxConfig
}

// podConfig is a pod's configuration, changed by edits.
func (e *env) podConfig(name string, edits ...func(*runtime.PodSandboxConfig)) *runtime.PodSandboxConfig {
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Uid: name + "-uid", Namespace: "default"},
		Hostname:     name,
		LogDirectory: filepath.Join(e.logs, name),
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"192.0.2.53"}},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "/" + e.d.Token,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
			},
		},
	}
	for _, edit := range edits {
		edit(config)
	}
	return config
}

// tryRun runs a pod, or says why it could not be.
func (e *env) tryRun(config *runtime.PodSandboxConfig) (*pod, error) {
	if err := os.MkdirAll(config.LogDirectory, 0o700); err != nil {
		return nil, err
	}
	ctx, cancel := e.call()
	defer cancel()
	r, err := e.cri.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: e.handler})
	if err != nil {
		return nil, err
	}
	return &pod{e, r.PodSandboxId, config}, nil
}

// run runs a pod.
func (e *env) run(name string, edits ...func(*runtime.PodSandboxConfig)) *pod {
	e.Helper()
	p, err := e.tryRun(e.podConfig(name, edits...))
	if err != nil {
		e.Fatalf("run pod %s: %v", name, err)
	}
	e.ids = append(e.ids, p.id)
	return p
}

func (p *pod) status() *runtime.PodSandboxStatus {
	p.e.Helper()
	ctx, cancel := p.e.call()
	defer cancel()
	r, err := p.e.cri.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		p.e.Fatalf("status of pod %s: %v", p.config.Metadata.Name, err)
	}
	return r.Status
}

func (p *pod) stop() {
	p.e.Helper()
	ctx, cancel := p.e.call()
	defer cancel()
	if _, err := p.e.cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.e.Fatalf("stop pod %s: %v", p.config.Metadata.Name, err)
	}
}

// remove stops the pod first.
func (p *pod) remove() {
	p.e.Helper()
	p.stop()
	ctx, cancel := p.e.call()
	defer cancel()
	if _, err := p.e.cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.e.Fatalf("remove pod %s: %v", p.config.Metadata.Name, err)
	}
}

// A container is one of a pod.
type container struct {
	e   *env
	id  string
	log string // path
}

// idle keeps a container running, and ends when told.
const idle = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"

// tryCreate creates a container that runs a shell script.
func (p *pod) tryCreate(name, script string, edits ...func(*runtime.ContainerConfig)) (*container, error) {
	config := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name},
		Image:    &runtime.ImageSpec{Image: images.Busybox},
		Command:  []string{"sh", "-c", script},
		LogPath:  name + ".log",
		Linux: &runtime.LinuxContainerConfig{
			Resources: &runtime.LinuxContainerResources{},
			SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
			},
		},
	}
	for _, edit := range edits {
		edit(config)
	}
	ctx, cancel := p.e.call()
	defer cancel()
	r, err := p.e.cri.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", name, err)
	}
	return &container{p.e, r.ContainerId, filepath.Join(p.config.LogDirectory, config.LogPath)}, nil
}

// tryStart creates and starts a container. A container comes back with the
// error where it was created.
func (p *pod) tryStart(name, script string, edits ...func(*runtime.ContainerConfig)) (*container, error) {
	c, err := p.tryCreate(name, script, edits...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := p.e.call()
	defer cancel()
	if _, err := p.e.cri.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.id}); err != nil {
		return c, fmt.Errorf("start container %s: %w", name, err)
	}
	return c, nil
}

func (p *pod) start(name, script string, edits ...func(*runtime.ContainerConfig)) *container {
	p.e.Helper()
	c, err := p.tryStart(name, script, edits...)
	if err != nil {
		p.e.Fatal(err)
	}
	return c
}

func (c *container) status() *runtime.ContainerStatus {
	c.e.Helper()
	ctx, cancel := c.e.call()
	defer cancel()
	r, err := c.e.cri.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		c.e.Fatalf("status of container: %v", err)
	}
	return r.Status
}

// exited waits for the container's end.
func (c *container) exited() *runtime.ContainerStatus {
	c.e.Helper()
	var s *runtime.ContainerStatus
	c.e.eventually("the container exits", func(context.Context) error {
		if s = c.status(); s.State != runtime.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", s.State)
		}
		return nil
	})
	return s
}

// running fails the test where the container does not run.
func (c *container) running() {
	c.e.Helper()
	if s := c.status(); s.State != runtime.ContainerState_CONTAINER_RUNNING {
		c.e.Errorf("the container is %v with exit code %d, %s, %s; want it running", s.State, s.ExitCode, s.Reason, s.Message)
	}
}

// stop gives the container no time.
func (c *container) stop() {
	c.e.Helper()
	ctx, cancel := c.e.call()
	defer cancel()
	if _, err := c.e.cri.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.id}); err != nil {
		c.e.Fatalf("stop container: %v", err)
	}
}

func (c *container) remove() {
	c.e.Helper()
	ctx, cancel := c.e.call()
	defer cancel()
	if _, err := c.e.cri.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: c.id}); err != nil {
		c.e.Fatalf("remove container: %v", err)
	}
}

// A result is what a command in a container came to.
type result struct {
	stdout, stderr string
	code           int32
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d, stdout %.4000q, stderr %.4000q", r.code, r.stdout, r.stderr)
}

// tryExec runs a command in the container; timeout in seconds, 0 for none.
func (c *container) tryExec(timeout int64, args ...string) (result, error) {
	ctx, cancel := c.e.call()
	defer cancel()
	r, err := c.e.cri.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: args, Timeout: timeout})
	if err != nil {
		return result{}, err
	}
	return result{string(r.Stdout), string(r.Stderr), r.ExitCode}, nil
}

// exec runs a shell script in the container, whatever it comes to.
func (c *container) exec(script string) result {
	c.e.Helper()
	r, err := c.tryExec(0, "sh", "-c", script)
	if err != nil {
		c.e.Fatalf("exec %q: %v", script, err)
	}
	return r
}

// sh runs a shell script that has to succeed, and returns what it prints,
// without surrounding space.
func (c *container) sh(script string) string {
	c.e.Helper()
	r := c.exec(script)
	if r.code != 0 {
		c.e.Fatalf("exec %q: %v", script, r)
	}
	return strings.TrimSpace(r.stdout)
}

// want compares what a script prints.
func (c *container) want(script, want string) {
	c.e.Helper()
	if got := c.sh(script); got != want {
		c.e.Errorf("%s: got %q, want %q", script, got, want)
	}
}

// output is what the log has of one stream, "stdout" or "stderr".
func (c *container) output(stream string) string {
	c.e.Helper()
	data, err := os.ReadFile(c.log)
	if err != nil {
		c.e.Fatal(err)
	}
	var b strings.Builder
	for line := range strings.Lines(string(data)) {
		// time stream F|P text
		fields := strings.SplitN(line, " ", 4)
		if len(fields) != 4 {
			c.e.Fatalf("line of the log %q", line)
		}
		if fields[1] == stream {
			b.WriteString(fields[3])
		}
	}
	return b.String()
}

// waitOutput waits until the log has text on standard output.
func (c *container) waitOutput(text string) {
	c.e.Helper()
	c.e.eventually("the container prints", func(context.Context) error {
		if got := c.output("stdout"); !strings.Contains(got, text) {
			return fmt.Errorf("no %q in %q; the container is %v", text, got, c.status().State)
		}
		return nil
	})
}
