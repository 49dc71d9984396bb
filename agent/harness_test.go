package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/agent"
	"github.com/husk-containers/husk/agent/agenttest"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

func TestMain(m *testing.M) {
	slog.SetLogLoggerLevel(slog.LevelWarn)
	os.Exit(m.Run())
}

// A guest is an agent in this process, and the host's end of its channel.
type guest struct {
	*testing.T
	agentv1.AgentClient
	ctx      context.Context
	runtime  *agenttest.Runtime
	platform *agenttest.Platform
	share    string
	control  net.Conn // the host's end
	streams  string   // path of the stream socket
	// namespaces of the containers; at first a PID namespace each
	namespaces []specs.LinuxNamespace
	end        context.CancelCauseFunc
	served     chan error
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	return newGuestWith(t, func(*agent.Options) {})
}

// newGuestWith has the agent's options changed.
func newGuestWith(t *testing.T, change func(*agent.Options)) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	dir := t.TempDir()
	g := &guest{
		T: t, ctx: ctx,
		platform:   &agenttest.Platform{},
		share:      t.TempDir(),
		streams:    filepath.Join(dir, "streams"),
		namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}},
		served:     make(chan error, 1),
	}
	g.runtime = agenttest.NewRuntime(agenttest.ShareRoot(g.share))
	streams, err := net.Listen("unix", g.streams)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(dir, "control"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if g.control, err = net.Dial("unix", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	control, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	opts := agent.Options{Version: "test", Runtime: g.runtime, Platform: g.platform, Streams: streams}
	change(&opts)
	a := agent.New(opts)
	serving, end := context.WithCancelCause(ctx)
	g.end = end
	go func() { g.served <- a.Serve(serving, control) }()
	client := ttrpc.NewClient(g.control)
	g.AgentClient = agentv1.NewAgentClient(client)
	t.Cleanup(func() {
		client.Close()
		end(nil)
		<-g.served
	})
	return g
}

// serveErr returns what Serve has returned, and leaves it for the clean-up.
func (g *guest) serveErr() error {
	g.Helper()
	select {
	case err := <-g.served:
		g.served <- err
		return err
	case <-g.ctx.Done():
		g.Fatal("Serve does not return")
		return nil
	}
}

// A stdio is the host's end of a process's streams.
type stdio struct {
	streams  *agentv1.Streams
	stdin    *net.UnixConn
	stdout   *net.UnixConn
	out, err bytes.Buffer // after eof
	reading  sync.WaitGroup
}

func (g *guest) dial(token stream.Token) *net.UnixConn {
	g.Helper()
	conn, err := net.Dial("unix", g.streams)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { conn.Close() })
	if err := stream.Offer(g.ctx, conn, token); err != nil {
		g.Fatal(err)
	}
	return conn.(*net.UnixConn)
}

// open opens streams and reads the output; silent leaves it unread.
func (g *guest) open(terminal, silent bool) *stdio {
	g.Helper()
	s := &stdio{streams: &agentv1.Streams{Terminal: terminal}}
	in, out, errs := stream.NewToken(), stream.NewToken(), stream.NewToken()
	s.stdin, s.streams.Stdin = g.dial(in), in[:]
	s.stdout, s.streams.Stdout = g.dial(out), out[:]
	read := func(conn *net.UnixConn, into *bytes.Buffer) {
		s.reading.Go(func() { io.Copy(into, conn); conn.Close() })
	}
	if !silent {
		read(s.stdout, &s.out)
	}
	if !terminal {
		conn := g.dial(errs)
		s.streams.Stderr = errs[:]
		read(conn, &s.err)
	}
	return s
}

// eof waits for the end of both outputs and returns stdout.
func (s *stdio) eof() string {
	s.reading.Wait()
	return s.out.String()
}

func process(terminal bool, args ...string) *specs.Process {
	return &specs.Process{Terminal: terminal, Args: args, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}}
}

// spec returns the spec of a container, whose root file system is made.
func (g *guest) spec(id string, p *specs.Process) []byte {
	g.Helper()
	if err := os.MkdirAll(filepath.Join(g.share, id, "rootfs"), 0o755); err != nil {
		g.Fatal(err)
	}
	return g.json(&specs.Spec{
		Root:    &specs.Root{Path: "/run/husk/share/" + id + "/rootfs"},
		Process: p,
		Linux:   &specs.Linux{CgroupsPath: "/husk/" + id, Namespaces: g.namespaces},
	})
}

func (g *guest) json(v any) []byte {
	g.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		g.Fatal(err)
	}
	return b
}

func (g *guest) create(id string, s *stdio, args ...string) error {
	g.Helper()
	answer, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{
		ContainerId: id, Spec: g.spec(id, process(s.streams.GetTerminal(), args...)), Streams: s.streams,
	})
	if err == nil {
		g.valid(answer)
	}
	return errgrpc.ToNative(err)
}

// start creates and starts a container.
func (g *guest) start(id string, s *stdio, args ...string) {
	g.Helper()
	if err := g.create(id, s, args...); err != nil {
		g.Fatal(err)
	}
	if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
		g.Fatal(err)
	}
}

func (g *guest) exec(id, execID string, s *stdio, args ...string) error {
	g.Helper()
	_, err := g.ExecProcess(g.ctx, &agentv1.ExecProcessRequest{
		ContainerId: id, ExecId: execID, Process: g.json(process(s.streams.GetTerminal(), args...)), Streams: s.streams,
	})
	return errgrpc.ToNative(err)
}

func (g *guest) wait(id, execID string) *agentv1.WaitProcessResponse {
	g.Helper()
	answer, err := g.WaitProcess(g.ctx, &agentv1.WaitProcessRequest{ContainerId: id, ExecId: execID})
	if err != nil {
		g.Fatal(err)
	}
	g.valid(answer)
	return answer
}

func (g *guest) signal(id string, signal uint32, all bool) error {
	g.Helper()
	_, err := g.SignalProcess(g.ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: signal, All: all})
	return errgrpc.ToNative(err)
}

func (g *guest) remove(id, execID string) error {
	g.Helper()
	_, err := g.RemoveContainer(g.ctx, &agentv1.RemoveContainerRequest{ContainerId: id, ExecId: execID})
	return errgrpc.ToNative(err)
}

func (g *guest) valid(m interface{ Validate() error }) {
	g.Helper()
	if err := m.Validate(); err != nil {
		g.Fatal(err)
	}
}
