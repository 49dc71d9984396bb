package path_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent"
	"github.com/husk-containers/husk/agent/agenttest"
	"github.com/husk-containers/husk/agent/container"
	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/protocols/stream"
	"github.com/husk-containers/husk/virtcontainers"
)

// pidRuntime remembers the paths of the PID namespaces that containers were given,
// empty for their own.
type pidRuntime struct {
	*agenttest.Runtime
	mu    sync.Mutex
	paths map[string]string
}

func (r *pidRuntime) Create(ctx context.Context, id string, spec *specs.Spec, fileSystems []string, stdio container.Stdio) (*container.Process, error) {
	p, err := r.Runtime.Create(ctx, id, spec, fileSystems, stdio)
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace && err == nil {
			r.mu.Lock()
			r.paths[id] = ns.Path
			r.mu.Unlock()
		}
	}
	return p, err
}

// A pidPod is a pod whose containers have PID namespaces.
type pidPod struct {
	*testing.T
	dir     string
	sandbox *virtcontainers.Sandbox
	runtime pidRuntime
}

func newPIDPod(t *testing.T, change ...func(*config.Config, *agent.Options)) *pidPod {
	t.Helper()
	p := &pidPod{T: t, dir: t.TempDir()}
	p.runtime.paths = map[string]string{}
	cfg := config.Default()
	for _, c := range change {
		c(&cfg, &agent.Options{})
	}
	cfg.Runtime.StateDir = filepath.Join(p.dir, "run")
	var err error
	p.sandbox, err = virtcontainers.NewSandbox(t.Context(), virtcontainers.Options{
		ID: "pod", Namespace: "ns", Bundle: p.dir, Pod: true, Config: &cfg,
		Hypervisor: &hypertest.Loopback{Guest: func(ctx context.Context, g *hypertest.GuestEnd) error {
			p.runtime.Runtime = agenttest.NewRuntime(agenttest.ShareRoot(g.Config.Devices[0].(hypervisor.Share).Dir))
			streams, err := g.Listen(stream.Port)
			if err != nil {
				return err
			}
			copied, err := g.Listen(files.Port)
			if err != nil {
				return err
			}
			control, err := g.DialControl(ctx)
			if err != nil {
				return err
			}
			o := agent.Options{
				Version: "test", Started: agent.Uptime(), Runtime: &p.runtime,
				Platform: &agenttest.Platform{}, Streams: streams, Files: copied,
			}
			for _, c := range change {
				c(&config.Config{}, &o)
			}
			return agent.New(o).Serve(ctx, control)
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.sandbox.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return p
}

// create makes a container whose PID namespace has that path in its spec.
func (p *pidPod) create(id, path string) (*virtcontainers.Container, error) {
	p.Helper()
	bundle := filepath.Join(p.dir, id)
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs"), 0o755); err != nil {
		p.Fatal(err)
	}
	raw, err := json.Marshal(&specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"sleep", "1000"}, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.NetworkNamespace}, {Type: specs.PIDNamespace, Path: path},
		}},
	})
	if err != nil {
		p.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o644); err != nil {
		p.Fatal(err)
	}
	return p.sandbox.CreateContainer(p.Context(), virtcontainers.ContainerConfig{ID: id, Bundle: bundle})
}

// made creates a container and tells which PID namespace it was given.
func (p *pidPod) made(id, path, want string) *virtcontainers.Container {
	p.Helper()
	c, err := p.create(id, path)
	if err != nil {
		p.Fatal(err)
	}
	p.runtime.mu.Lock()
	defer p.runtime.mu.Unlock()
	if got := p.runtime.paths[id]; got != want {
		p.Errorf("container %s has the PID namespace %q, want %q", id, got, want)
	}
	return c
}

// end kills a container and waits for its end.
func (p *pidPod) end(c *virtcontainers.Container) {
	p.Helper()
	if err := c.Init().Kill(p.Context(), uint32(unix.SIGKILL), false); err != nil {
		p.Fatal(err)
	}
	<-c.Init().Exited()
}

// TestTheTargetOfAPIDNamespaceIsToldByThePodsOtherContainers has the path be the
// same always, as it is on a host.
func TestTheTargetOfAPIDNamespaceIsToldByThePodsOtherContainers(t *testing.T) {
	const path = "/proc/4711/ns/pid"
	p := newPIDPod(t)
	p.made("shared", path, agentv1.SharedPID) // and so it stays
	a := p.made("a", "", "")                  // created is living
	p.made("debug-a", path, agentv1.ContainerPID("a"))
	if err := a.Init().Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.made("debug-a2", path, agentv1.ContainerPID("a")) // the debugger's own does not count

	b := p.made("b", "", "")
	_, err := p.create("debug", path)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), ": a, b;") {
		t.Errorf("a path where two have namespaces of their own: %v", err)
	}
	if n := len(p.sandbox.Containers()); n != 5 {
		t.Errorf("%d containers, want 5, without the refused one", n)
	}

	p.end(b) // it need not be deleted
	p.end(p.made("debug", path, agentv1.ContainerPID("a")))
	p.end(a)
	p.made("last", path, agentv1.SharedPID)
}

// The pod has system files, which are copied: the agent here does not take them.
func TestAGuestThatTakesNoFilesIsADeadline(t *testing.T) {
	p := newPIDPod(t, func(c *config.Config, o *agent.Options) {
		c.Runtime.RequestTimeout = config.Duration{Duration: 300 * time.Millisecond}
		o.Files = nil
	})
	if err := p.sandbox.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := p.create("a", "")
	if err == nil || !strings.Contains(err.Error(), "/etc/hosts") || !strings.Contains(err.Error(), "request_timeout (300ms)") {
		t.Errorf("%v, want that the file and the deadline are named", err)
	}
	if left := p.sandbox.Containers(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
