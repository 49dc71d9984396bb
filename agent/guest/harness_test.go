// Package guest drives the agent of a real guest by its calls, below the shim.
package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

const (
	kernel = "../../build/guest/vmlinuz"
	image  = "../../build/guest/initrd.img"
	// patience suits TCG on a busy machine.
	patience = 3 * time.Minute
)

// A guest is a VM with the agent in it.
type guest struct {
	*testing.T
	agentv1.AgentClient
	ctx context.Context
	vm  hypervisor.VM
	// share is what the containers' root file systems are in, called as they are.
	share   string
	busybox []byte
}

// boot boots a guest, or skips.
func boot(t *testing.T, change func(*hypervisor.Config)) *guest {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a real VM")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to run QEMU as another user")
	}
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("QEMU is not installed")
	}
	if _, err := os.Stat(image); err != nil {
		t.Skipf("no guest image: %v; run make guest", err)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("no busybox: %v; install the package busybox-static", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	g := &guest{T: t, ctx: ctx, share: t.TempDir(), busybox: busybox}
	q := qemu.New(qemu.Options{
		Path: path, Accelerator: "auto", Channels: []string{"vhost-vsock", "virtio-serial"}, Machine: "q35", VirtiofsdCache: "auto",
		Log: slog.New(slog.DiscardHandler),
	})
	cfg := hypervisor.Config{
		ID: "test", Dir: t.TempDir(), VCPUs: 2, MemoryMiB: 256, Kernel: kernel, Initrd: image,
		Devices: []hypervisor.Device{hypervisor.Share{Tag: "husk", Dir: g.share}},
	}
	if change != nil {
		change(&cfg)
	}
	if g.vm, err = q.Start(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if err := g.vm.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	control, err := g.vm.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(control)
	t.Cleanup(func() { client.Close() })
	g.AgentClient = agentv1.NewAgentClient(client)
	if _, err := g.Hello(ctx, &agentv1.HelloRequest{Version: "test"}); err != nil {
		t.Fatal(err)
	}
	_, err = g.Configure(ctx, &agentv1.ConfigureRequest{
		SandboxId: "s", ClockNs: time.Now().UnixNano(), Entropy: make([]byte, 64),
		Storages: []*agentv1.Storage{{Kind: agentv1.Storage_KIND_VIRTIOFS, Source: "husk", Target: "/run/husk/share"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// An output is what a process has written.
type output struct {
	streams *agentv1.Streams
	conn    net.Conn
	read    sync.WaitGroup
	mu      sync.Mutex
	text    bytes.Buffer
}

// Write implements io.Writer: it keeps the first MiB.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.text.Len() < 1<<20 {
		o.text.Write(b)
	}
	return len(b), nil
}

func (g *guest) output() *output {
	g.Helper()
	token := stream.NewToken()
	conn, err := g.vm.Dial(g.ctx, stream.Port)
	if err == nil {
		err = stream.Offer(g.ctx, conn, token)
	}
	if err != nil {
		g.Fatal(err)
	}
	o := &output{streams: &agentv1.Streams{Stdout: token[:]}, conn: conn}
	o.read.Go(func() { io.Copy(o, conn) }) //nolint:errcheck // it ends with the guest
	g.Cleanup(func() { conn.Close(); o.read.Wait() })
	return o
}

func (o *output) eof() string {
	o.read.Wait()
	return o.text.String()
}

func process(script string) *specs.Process {
	return &specs.Process{Args: []string{"sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}}
}

func (g *guest) json(v any) []byte {
	g.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		g.Fatal(err)
	}
	return b
}

// root makes a container's root file system. No two have a file in common, as on a host,
// where each is an overlay of its own; a lock of the file that all programs are, which the
// kernel takes for each fork, would otherwise be in common too.
func (g *guest) root(id string) string {
	g.Helper()
	// A name of its own: the guest remembers for a second what one meant before.
	root, err := os.MkdirTemp(g.share, id+"-")
	if err == nil {
		err = os.Chmod(root, 0o755)
	}
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(root, "bin/busybox"), g.busybox, 0o755))
	for _, name := range []string{"sh", "sleep", "cat", "dd", "yes", "true", "head", "tail", "nproc", "usleep", "taskset", "echo", "kill", "free"} {
		err = errors.Join(err, os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	if err != nil {
		g.Fatal(err)
	}
	return filepath.Join("/run/husk/share", filepath.Base(root))
}

// run creates and starts a container with a shell script.
func (g *guest) run(id, script string, r *specs.LinuxResources) *output {
	g.Helper()
	o := g.output()
	if err := g.create(id, script, r, o); err != nil {
		g.Fatal(err)
	}
	if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
		g.Fatal(err)
	}
	return o
}

func (g *guest) create(id, script string, r *specs.LinuxResources, o *output) error {
	g.Helper()
	s := &specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: g.root(id)}, Process: process(script),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			{Destination: "/dev/shm", Type: "bind", Source: agentv1.SharedShm, Options: []string{"rbind"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs"},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup"},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/husk/" + id, Resources: r,
			Namespaces: []specs.LinuxNamespace{{Type: "pid"}, {Type: "mount"}, {Type: "ipc"}, {Type: "cgroup"}},
		},
	}
	_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: id, Spec: g.json(s), Streams: o.streams})
	return errgrpc.ToNative(err)
}

// exec runs a script in a container and returns its output.
func (g *guest) exec(id, execID, script string) (string, error) {
	g.Helper()
	o := g.output()
	_, err := g.ExecProcess(g.ctx, &agentv1.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: g.json(process(script)), Streams: o.streams})
	if err != nil {
		o.conn.Close()
		return "", errgrpc.ToNative(err)
	}
	if _, err := g.WaitProcess(g.ctx, &agentv1.WaitProcessRequest{ContainerId: id, ExecId: execID}); err != nil {
		return "", errgrpc.ToNative(err)
	}
	out := strings.TrimSpace(o.eof())
	_, err = g.RemoveContainer(g.ctx, &agentv1.RemoveContainerRequest{ContainerId: id, ExecId: execID})
	return out, errgrpc.ToNative(err)
}

// file reads a file of a container's cgroup.
func (g *guest) file(id, name string) string {
	g.Helper()
	out, err := g.exec(id, "file", "cat /sys/fs/cgroup/"+name+" 2>&1")
	if err != nil {
		g.Fatal(err)
	}
	return out
}

func (g *guest) stats(id string) *agentv1.StatsContainerResponse {
	g.Helper()
	s, err := g.StatsContainer(g.ctx, &agentv1.StatsContainerRequest{ContainerId: id})
	if err == nil {
		err = s.Validate()
	}
	if err != nil {
		g.Fatal(err)
	}
	return s
}

func (g *guest) update(id, resources string) error {
	_, err := g.UpdateContainer(g.ctx, &agentv1.UpdateContainerRequest{ContainerId: id, Resources: []byte(resources)})
	return errgrpc.ToNative(err)
}

func (g *guest) wait(id string) *agentv1.WaitProcessResponse {
	g.Helper()
	exit, err := g.WaitProcess(g.ctx, &agentv1.WaitProcessRequest{ContainerId: id})
	if err != nil {
		g.Fatal(err)
	}
	return exit
}

func (g *guest) signal(id string, signal uint32) error {
	_, err := g.SignalProcess(g.ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: signal})
	return errgrpc.ToNative(err)
}

func (g *guest) remove(id string) error {
	_, err := g.RemoveContainer(g.ctx, &agentv1.RemoveContainerRequest{ContainerId: id})
	return errgrpc.ToNative(err)
}
