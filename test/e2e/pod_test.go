package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	shimapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/husk-containers/husk/test/daemon"
)

// sandboxer is the name of containerd's sandbox controller that asks shims.
const sandboxer = "shim"

// bundles is where that controller keeps its sandboxes' bundles, below root and
// state.
const bundles = "io.containerd.sandbox.controller.v1." + sandboxer

// A pod is a sandbox by the sandbox API of containerd.
type pod struct {
	*env
	id    string
	store sandboxapi.StoreClient
	sandboxapi.ControllerClient
}

// eachWithSandboxes is eachHusk for those generations that have the sandbox API.
func eachWithSandboxes(t *testing.T, test func(p *pod)) {
	t.Helper()
	eachHusk(t, func(e *env) {
		if e.generation.Name == "1.6" {
			e.Skip("containerd 1.6 has no sandbox API")
		}
		test(e.pod())
	})
}

// pod is a sandbox to be: nothing is done yet.
func (e *env) pod() *pod {
	e.Helper()
	conn, err := grpc.NewClient("unix://"+e.d.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(e.call))
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() { conn.Close() })
	return &pod{env: e, id: e.d.ID("pod"), store: sandboxapi.NewStoreClient(conn), ControllerClient: sandboxapi.NewControllerClient(conn)}
}

// call is what every call to containerd has: its namespace, and a time limit.
func (e *env) call(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", e.d.Token), commandTimeout)
	defer cancel()
	return invoke(ctx, method, req, reply, conn, opts...)
}

// create makes the sandbox, as a client of containerd does.
func (p *pod) create(netns string) error {
	p.Helper()
	sb := &types.Sandbox{SandboxID: p.id, Sandboxer: sandboxer, Runtime: &types.Sandbox_Runtime{Name: *runtimeFlag}}
	if _, err := p.store.Create(p.Context(), &sandboxapi.StoreCreateRequest{Sandbox: sb}); err != nil && !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		p.Fatal(err)
	}
	_, err := p.Create(p.Context(), &sandboxapi.ControllerCreateRequest{SandboxID: p.id, Sandboxer: sandboxer, Sandbox: sb, NetnsPath: netns})
	return err
}

// run creates and starts the sandbox, and checks what is said of it then.
func (p *pod) run(netns string) {
	p.Helper()
	before := time.Now()
	if err := p.create(netns); err != nil {
		p.Fatal(err)
	}
	if st := p.status(); st.State != "SANDBOX_NOTREADY" {
		p.Errorf("status before the start: %v", st)
	}
	started, err := p.Start(p.Context(), &sandboxapi.ControllerStartRequest{SandboxID: p.id, Sandboxer: sandboxer})
	if err != nil {
		p.Fatal(err)
	}
	qemu := p.process("qemu-system").PID
	created := started.CreatedAt.AsTime()
	if started.Pid != uint32(qemu) || created.Before(before) || created.After(time.Now()) {
		p.Errorf("start: %v; QEMU is %d, the test began at %v", started, qemu, before)
	}
	st := p.status()
	if st.SandboxID != p.id || st.State != "SANDBOX_READY" || st.Pid != uint32(qemu) || !st.CreatedAt.AsTime().Equal(created) {
		p.Errorf("status: %v, want it ready with pid %d, created at %v", st, qemu, created)
	}
	for key, want := range map[string]string{"pid": strconv.Itoa(qemu), "state": "SANDBOX_READY", "netns": netns} {
		if got, ok := st.Info[key]; got != want || !ok {
			p.Errorf("verbose status has %s %q, want %q", key, got, want)
		}
	}
}

func (p *pod) status() *sandboxapi.ControllerStatusResponse {
	p.Helper()
	st, err := p.Status(p.Context(), &sandboxapi.ControllerStatusRequest{SandboxID: p.id, Sandboxer: sandboxer, Verbose: true})
	if err != nil {
		p.Fatal(err)
	}
	return st
}

// member starts a container in the sandbox, through the task API.
func (p *pod) member(script string) *command {
	p.Helper()
	c := p.startSh("member", script, "--sandbox", p.id)
	c.expect("ready")
	return c
}

// A sandboxExit is what Wait came to, and when.
type sandboxExit struct {
	*sandboxapi.ControllerWaitResponse
	err error
	at  time.Time
}

// wait calls Wait in the background.
func (p *pod) wait() <-chan sandboxExit {
	exit := make(chan sandboxExit, 1)
	go func() { // ends with the call, which has a limit
		resp, err := p.Wait(p.Context(), &sandboxapi.ControllerWaitRequest{SandboxID: p.id, Sandboxer: sandboxer})
		exit <- sandboxExit{resp, err, time.Now()}
	}()
	return exit
}

// ends wants the sandbox to have ended with that status, which Wait tells soon
// after something.
func (p *pod) ends(exit <-chan sandboxExit, after time.Time, status uint32) {
	p.Helper()
	x := <-exit
	if x.err != nil {
		p.Fatalf("wait: %v", x.err)
	}
	if x.ExitStatus != status || x.ExitedAt.AsTime().Before(p.status().CreatedAt.AsTime()) || x.ExitedAt.AsTime().After(x.at) {
		p.Errorf("wait: %v, want exit status %d", x.ControllerWaitResponse, status)
	}
	if took := x.at.Sub(after); took > deathLimit {
		p.Errorf("wait told of the end after %v, want at most %v", took, deathLimit)
	}
	if st := p.status(); st.State != "SANDBOX_NOTREADY" || st.Pid != 0 || !st.ExitedAt.AsTime().Equal(x.ExitedAt.AsTime()) {
		p.Errorf("status after the end: %v, want it not ready, without a pid, exited at %v", st, x.ExitedAt.AsTime())
	}
}

func (p *pod) stop() {
	p.Helper()
	if _, err := p.Stop(p.Context(), &sandboxapi.ControllerStopRequest{SandboxID: p.id, Sandboxer: sandboxer}); err != nil {
		p.Errorf("stop: %v", err)
	}
}

// shutdown ends the shim, of which nothing is left then. What else could be left
// is checked when the test ends.
func (p *pod) shutdown() {
	p.Helper()
	shim, socket := p.process("containerd-shim"), p.address()
	if _, err := p.Shutdown(p.Context(), &sandboxapi.ControllerShutdownRequest{SandboxID: p.id, Sandboxer: sandboxer}); err != nil {
		p.Fatalf("shut down: %v", err)
	}
	ctx, cancel := context.WithTimeout(p.Context(), commandTimeout)
	defer cancel()
	if err := daemon.WaitExit(ctx, shim.PID); err != nil {
		p.Error(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		p.Errorf("the shim's socket %s is left: %v", socket, err)
	}
	if _, err := p.store.Delete(p.Context(), &sandboxapi.StoreDeleteRequest{SandboxID: p.id}); err != nil {
		p.Error(err)
	}
	p.nothingLeft()
}

// nothingLeft wants no bundle of the sandbox's.
func (p *pod) nothingLeft() {
	p.Helper()
	for _, top := range []string{"root", "state"} {
		left, err := filepath.Glob(filepath.Join(p.d.Dir, top, bundles, "*/*"))
		if err != nil || len(left) > 0 {
			p.Errorf("left of the sandbox: %v, %v", left, err)
		}
	}
}

// address is the path of the shim's socket, where containerd keeps it.
func (p *pod) address() string {
	p.Helper()
	raw, err := os.ReadFile(filepath.Join(p.d.Dir, "state", bundles, p.d.Token, p.id, "bootstrap.json"))
	if err != nil {
		p.Fatal(err)
	}
	return p.socket(raw)
}

// socket is the path in the answer of a shim's start.
func (e *env) socket(answer []byte) string {
	e.Helper()
	var params struct{ Address, Protocol string }
	if err := json.Unmarshal(answer, &params); err != nil || params.Protocol != "ttrpc" {
		e.Fatalf("the shim's address %q: %v", answer, err)
	}
	return strings.TrimPrefix(params.Address, "unix://")
}

// shim is the shim's own side of the sandbox API, without containerd between.
func (e *env) shim(socket string) shimapi.TTRPCSandboxService {
	e.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		e.Fatal(err)
	}
	client := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(
		func(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
			ctx, cancel := context.WithTimeout(ctx, commandTimeout)
			defer cancel()
			return invoke(ctx, req, resp)
		}))
	e.Cleanup(func() { client.Close() })
	return shimapi.NewTTRPCSandboxClient(client)
}

// wantClass wants what a call came to to be an error of a class.
func (e *env) wantClass(what string, is func(error) bool, err error) {
	e.Helper()
	if !is(errgrpc.ToNative(err)) {
		e.Errorf("%s: %v", what, err)
	}
}
