package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	shimapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

func TestSandboxWithNetworkNamespace(t *testing.T) {
	eachWithSandboxes(t, func(p *pod) {
		ns := p.newNetNS()
		p.run(ns.path)
		p.wantClass("second create", errdefs.IsAlreadyExists, p.create(ns.path))
		_, err := p.shim(p.address()).CreateSandbox(p.Context(), &shimapi.CreateSandboxRequest{SandboxID: p.id})
		p.wantClass("second create, by the shim itself", errdefs.IsAlreadyExists, err)
		member := p.member("echo ready; sleep 1000")

		ns.remove()
		if r := p.exec(p.d.ID("member"), "ping", "ping", "-c", "1", "-w", "60", ns.peer); r.code != 0 {
			p.Errorf("network after the namespace's name is gone: %v", r)
		}
		select {
		case <-ns.gone:
			p.Error("the network namespace is gone before Stop")
		default:
		}

		exit := p.wait()
		p.stop()
		p.ends(exit, time.Now(), 0)
		if r := p.endsSoon(member); r.code != 137 {
			p.Errorf("container of a sandbox that was stopped: %v, want exit code 137", r)
		}
		select {
		case <-ns.gone:
		case <-time.After(commandTimeout):
			p.Error("the network namespace is still there after Stop")
		}
		p.stop()
		p.ends(p.wait(), time.Now(), 0)
		p.shutdown()
		p.stop() // containerd takes one that is unknown for stopped
	})
}

func TestSandboxWhoseVMIsKilled(t *testing.T) {
	eachWithSandboxes(t, func(p *pod) {
		host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "from the host") //nolint:errcheck // the container tells
		}))
		defer host.Close()
		_, port, err := net.SplitHostPort(host.Listener.Addr().String())
		if err != nil {
			p.Fatal(err)
		}

		p.run("")
		member := p.member("echo ready; sleep 1000")
		r := p.exec(p.d.ID("member"), "get", "sh", "-c", fmt.Sprintf(
			`gateway=$(ip route | awk '$1 == "default" { print $3 }'); timeout 60 wget -q -O - http://$gateway:%s`, port))
		if r.stdout != "from the host" {
			p.Errorf("network of a sandbox without a namespace: %v", r)
		}

		if err := errors.Join(p.d.Stop(p.Context()), p.d.Resume(p.Context())); err != nil {
			p.Fatal(err)
		}
		if st := p.status(); st.State != "SANDBOX_READY" {
			p.Errorf("status after containerd started again: %v", st)
		}

		_, err = p.Metrics(p.Context(), &sandboxapi.ControllerMetricsRequest{SandboxID: p.id, Sandboxer: sandboxer})
		p.wantClass("metrics of a pod without a cgroup", errdefs.IsUnavailable, err)
		_, err = p.Update(p.Context(), &sandboxapi.ControllerUpdateRequest{
			SandboxID: p.id, Sandboxer: sandboxer, Sandbox: &types.Sandbox{SandboxID: p.id, Runtime: &types.Sandbox_Runtime{}},
		})
		p.wantClass("update", errdefs.IsNotImplemented, err)
		shim := p.shim(p.address())
		if _, err := shim.PingSandbox(p.Context(), &shimapi.PingRequest{SandboxID: p.id}); err != nil {
			p.Errorf("ping: %v", err)
		}

		exit := p.wait()
		p.kill(p.process("qemu-system"))
		killed := time.Now()
		p.endsSoon(member)
		p.ends(exit, killed, 137)
		_, err = shim.PingSandbox(p.Context(), &shimapi.PingRequest{SandboxID: p.id})
		p.wantClass("ping without a VM", errdefs.IsUnavailable, err)
		p.oneClearError(p.sh("echo never", "--sandbox", p.id), "qemu has ended")
		p.stop()
		p.shutdown()
	})
}

func TestSandboxThatMayNotHaveTheHostsNetwork(t *testing.T) {
	eachWithSandboxes(t, func(p *pod) {
		p.configure(daemon.Settings{"network": {"host_network": "refuse"}})
		err := p.create("")
		if err == nil { // the boot, which Create begins, may fail later
			_, err = p.Start(p.Context(), &sandboxapi.ControllerStartRequest{SandboxID: p.id, Sandboxer: sandboxer})
		}
		for _, want := range []string{"host's network", "network.host_network"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				p.Errorf("create and start: %v, want an error with %q", err, want)
			}
		}
		p.nothingLeft()
	})
}

// What containerd's own service would not let through to the shim.
func TestSandboxOutOfOrder(t *testing.T) {
	eachWithSandboxes(t, func(p *pod) {
		bundle := filepath.Join(p.d.Dir, bundles, p.d.Token, p.id)
		if err := os.MkdirAll(bundle, 0o700); err != nil {
			p.Fatal(err)
		}
		cmd := exec.CommandContext(p.Context(), filepath.Join(p.root, "build", "bin", "containerd-shim-husk-v2"),
			"-namespace", p.d.Token, "-id", p.id, "-address", p.d.Address(), "start")
		cmd.Dir = bundle
		cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+p.d.Address()+".ttrpc", "HUSK_CONFIG="+filepath.Join(p.d.Dir, "configuration.toml"))
		answer, err := cmd.CombinedOutput()
		if err != nil {
			p.Fatalf("start a shim: %v: %s", err, answer)
		}
		var pid int
		record, err := os.ReadFile(filepath.Join(bundle, "shim.pid"))
		if err == nil {
			_, err = fmt.Sscan(string(record), &pid)
		}
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() {
			if p.Failed() {
				unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may have ended
			}
		})
		socket := p.socket(answer)
		shim, ctx := p.shim(socket), p.Context()
		start := func() error {
			_, err := shim.StartSandbox(ctx, &shimapi.StartSandboxRequest{SandboxID: p.id})
			return err
		}
		create := func(id string) error {
			_, err := shim.CreateSandbox(ctx, &shimapi.CreateSandboxRequest{SandboxID: id, BundlePath: bundle})
			return err
		}
		ping := func() error {
			_, err := shim.PingSandbox(ctx, &shimapi.PingRequest{SandboxID: p.id})
			return err
		}
		platform, err := shim.Platform(ctx, &shimapi.PlatformRequest{SandboxID: p.id})
		if err != nil || platform.Platform.GetOS() != "linux" || platform.Platform.GetArchitecture() != runtime.GOARCH {
			p.Errorf("platform: %v, %v", platform, err)
		}
		p.wantClass("start before create", errdefs.IsFailedPrecondition, start())
		p.wantClass("ping before create", errdefs.IsNotFound, ping())
		p.wantClass("create of another", errdefs.IsNotFound, create("another"))
		if err := create(p.id); err != nil {
			p.Fatal(err)
		}
		p.wantClass("second create", errdefs.IsAlreadyExists, create(p.id))
		p.wantClass("ping before start", errdefs.IsFailedPrecondition, ping())
		if _, err := shim.StopSandbox(ctx, &shimapi.StopSandboxRequest{SandboxID: p.id}); err != nil {
			p.Errorf("stop before start: %v", err)
		}
		p.wantClass("start after stop", errdefs.IsFailedPrecondition, start())
		p.wantClass("create after stop", errdefs.IsAlreadyExists, create(p.id))
		if _, err := shim.ShutdownSandbox(ctx, &shimapi.ShutdownSandboxRequest{SandboxID: p.id}); err != nil {
			p.Fatalf("shut down: %v", err)
		}
		limit, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		if err := daemon.WaitExit(limit, pid); err != nil {
			p.Error(err)
		}
		if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
			p.Errorf("the shim's socket %s is left: %v", socket, err)
		}
	})
}
