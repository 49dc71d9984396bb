package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/google/go-cmp/cmp"

	"github.com/husk-containers/husk/agent"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/protocols/stream"
)

func TestContainer(t *testing.T) {
	g := newGuest(t)
	for round := range 2 { // the id can be used again
		s := g.open(false, false)
		g.start("c", s, "sh", "-c", "echo out; echo err >&2; exit 3")
		exit := g.wait("c", "")
		if exit.GetExitStatus() != 3 || exit.GetStdoutBytes() != 4 || exit.GetStderrBytes() != 4 || exit.GetExitedAtNs() == 0 {
			t.Errorf("round %d: exit %v", round, exit)
		}
		if out := s.eof(); out != "out\n" || s.err.String() != "err\n" {
			t.Errorf("round %d: stdout %q, stderr %q", round, out, &s.err)
		}
		if err := g.signal("c", 9, false); !errdefs.IsNotFound(err) {
			t.Errorf("round %d: signal after the end: %v", round, err)
		}
		if err := g.remove("c", ""); err != nil {
			t.Fatal(err)
		}
		if err := g.remove("c", ""); !errdefs.IsNotFound(err) {
			t.Errorf("round %d: second remove: %v", round, err)
		}
	}
}

func TestWithoutStreams(t *testing.T) {
	g := newGuest(t)
	s := &stdio{streams: &agentv1.Streams{}}
	g.start("c", s, "sh", "-c", "cat; echo gone; exit 2")
	if exit := g.wait("c", ""); exit.GetExitStatus() != 2 || exit.GetStdoutBytes() != 0 {
		t.Fatalf("exit %v", exit)
	}
}

func TestStdinHalfClose(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, false)
	g.start("c", s, "cat")
	in := bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16)
	if _, err := s.stdin.Write(in); err != nil {
		t.Fatal(err)
	}
	s.stdin.CloseWrite()
	exit := g.wait("c", "")
	if s.eof(); !bytes.Equal(s.out.Bytes(), in) || exit.GetStdoutBytes() != uint64(len(in)) {
		t.Fatalf("%d bytes came back of %d, exit %v", s.out.Len(), len(in), exit)
	}
}

func TestStdinNobodyReads(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, false)
	g.start("c", s, "sh", "-c", "exec <&-; echo closed; exec sleep 1000")
	// Endless input ends with an error, for the process has closed its end.
	_, err := io.Copy(s.stdin, zeros{})
	if err == nil {
		t.Fatal("all of an endless input was taken")
	}
	if err := g.signal("c", 9, false); err != nil {
		t.Fatal(err)
	}
	g.wait("c", "")
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestBurstBeforeExit(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, false)
	g.start("c", s, "sh", "-c", "head -c 20000000 /dev/zero; head -c 3000000 /dev/zero >&2")
	exit := g.wait("c", "")
	if s.eof(); s.out.Len() != 20000000 || s.err.Len() != 3000000 || exit.GetStdoutBytes() != 20000000 || exit.GetStderrBytes() != 3000000 {
		t.Fatalf("%d and %d bytes, exit %v", s.out.Len(), s.err.Len(), exit)
	}
}

func TestTerminal(t *testing.T) {
	g := newGuest(t)
	s := g.open(true, false)
	s.streams.Columns, s.streams.Rows = 100, 30
	g.start("c", s, "sh", "-c", "stty -echo; stty size; read a; stty size; read b; echo $a $b; exit 4")
	if _, err := g.ResizeTTY(g.ctx, &agentv1.ResizeTTYRequest{ContainerId: "c", Columns: 120, Rows: 40}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(s.stdin, "one\n")
	io.WriteString(s.stdin, "two\n")
	s.stdin.CloseWrite() // does not hang up
	exit := g.wait("c", "")
	out := s.eof()
	if !strings.Contains(out, "40 120\r\n") || !strings.HasSuffix(out, "one two\r\n") || exit.GetExitStatus() != 4 {
		t.Fatalf("output %q, exit %v", out, exit)
	}
	if exit.GetStdoutBytes() != uint64(len(out)) {
		t.Errorf("%d bytes of output, exit %v", len(out), exit)
	}
}

func TestTerminalBurstBeforeExit(t *testing.T) {
	g := newGuest(t)
	s := g.open(true, false)
	g.start("c", s, "seq", "1", "20000")
	g.wait("c", "")
	if out := s.eof(); strings.Count(out, "\n") != 20000 || !strings.HasSuffix(out, "20000\r\n") {
		t.Fatalf("%d lines, ending in %q", strings.Count(out, "\n"), out[max(0, len(out)-20):])
	}
}

func TestResizeWithoutTerminal(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, false), "true")
	_, err := g.ResizeTTY(g.ctx, &agentv1.ResizeTTYRequest{ContainerId: "c", Columns: 1, Rows: 1})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Fatalf("got %v", err)
	}
}

func TestExec(t *testing.T) {
	g := newGuest(t)
	if err := g.create("c", g.open(false, false), "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	if err := g.exec("c", "e", g.open(false, false), "true"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec before start: %v", err)
	}
	if _, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	_, err := g.StartContainer(g.ctx, &agentv1.StartContainerRequest{ContainerId: "c"})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second start: %v", err)
	}
	s := g.open(false, false)
	if err := g.exec("c", "e", s, "sh", "-c", "read x; echo $x; exit 5"); err != nil {
		t.Fatal(err)
	}
	if err := g.exec("c", "e", g.open(false, false), "true"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second exec of one id: %v", err)
	}
	list, err := g.ListProcesses(g.ctx, &agentv1.ListProcessesRequest{ContainerId: "c"})
	if err != nil || list.Validate() != nil {
		t.Fatal(err, list)
	}
	var execs int
	for _, p := range list.GetProcesses() {
		if p.GetExecId() == "e" {
			execs++
		}
	}
	if execs != 1 || len(list.GetProcesses()) < 2 {
		t.Errorf("processes %v", list)
	}
	io.WriteString(s.stdin, "hello\n")
	if exit := g.wait("c", "e"); exit.GetExitStatus() != 5 {
		t.Errorf("exit %v", exit)
	}
	if out := s.eof(); out != "hello\n" {
		t.Errorf("output %q", out)
	}
	if err := g.remove("c", "e"); err != nil {
		t.Error(err)
	}
	if err := g.exec("c", "e", g.open(false, false), "sleep", "1000"); err != nil {
		t.Errorf("id not free again: %v", err)
	}
	if err := g.remove("c", "e"); err != nil { // kills it
		t.Error(err)
	}
	if err := g.remove("c", ""); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	g := newGuest(t)
	for _, tc := range []struct {
		name  string
		do    func() error
		class error
		want  string
	}{
		{"command in PATH", func() error { return g.create("c", g.open(false, false), "nosuch") }, errdefs.ErrNotFound, "not found in $PATH"},
		{"command not executable", func() error { return g.create("c", g.open(false, false), "/etc/passwd") }, errdefs.ErrPermissionDenied, "not executable"},
		{"cwd", func() error {
			p := process(false, "true")
			p.Cwd = "/nosuch"
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: g.spec("c", p)})
			return err
		}, errdefs.ErrInvalidArgument, `"/nosuch"`},
		{"root", func() error {
			spec := bytes.Replace(g.spec("c", process(false, "true")), []byte("share/c"), []byte("share/none"), 1)
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: spec})
			return err
		}, errdefs.ErrNotFound, "root file system"},
		{"root outside", func() error {
			spec := bytes.Replace(g.spec("c", process(false, "true")), []byte("/run/husk/share"), []byte("/run/husk/../../etc"), 1)
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: spec})
			return err
		}, errdefs.ErrInvalidArgument, "root.path"},
		{"unknown field", func() error {
			spec := bytes.Replace(g.spec("c", process(false, "true")), []byte(`{"`), []byte(`{"novel":1,"`), 1)
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: spec})
			return err
		}, errdefs.ErrInvalidArgument, `"novel"`},
		{"cgroup", func() error {
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "d", Spec: g.spec("c", process(false, "true"))})
			return err
		}, errdefs.ErrInvalidArgument, "cgroupsPath"},
		{"terminal", func() error {
			_, err := g.CreateContainer(g.ctx, &agentv1.CreateContainerRequest{ContainerId: "c", Spec: g.spec("c", process(true, "true"))})
			return err
		}, errdefs.ErrInvalidArgument, "process.terminal"},
		{"id", func() error { return g.create("a b", g.open(false, false), "true") }, errdefs.ErrInvalidArgument, "container_id"},
		{"token", func() error {
			s := g.open(false, false)
			token := stream.NewToken()
			s.streams.Stdout = token[:]
			return g.create("c", s, "true")
		}, errdefs.ErrNotFound, token4},
		{"unknown container", func() error { return g.signal("nosuch", 9, false) }, errdefs.ErrNotFound, `"nosuch"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.do()
			if !errors.Is(err, tc.class) {
				err = errgrpc.ToNative(err)
			}
			if !errors.Is(err, tc.class) || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("got %v, want %v with %q", err, tc.class, tc.want)
			}
		})
	}
	g.start("c", g.open(false, false), "true") // and nothing is left of all that
	g.wait("c", "")
}

const token4 = "no connection waits"

func TestDescendantDoesNotDelayTheExit(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, false)
	g.start("c", s, "sh", "-c", "echo first; (read x; echo late) <&0 & exit 0")
	exit := g.wait("c", "") // the descendant waits for stdin, which the exit closes
	if exit.GetStdoutBytes() < 6 {
		t.Errorf("exit %v", exit)
	}
	if out := s.eof(); out != "first\nlate\n" {
		t.Errorf("output %q", out)
	}
}

func TestHostVanishes(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, true)
	g.start("c", s, "yes")
	s.stdout.Close()
	if exit := g.wait("c", ""); exit.GetExitStatus() != 128+uint32(syscall.SIGPIPE) {
		t.Errorf("exit %v", exit)
	}
}

func TestHostVanishesFromTerminal(t *testing.T) {
	g := newGuest(t)
	s := g.open(true, true)
	g.start("c", s, "sh", "-c", "yes | head -c 5000000; exit 6")
	s.stdout.Close()
	if exit := g.wait("c", ""); exit.GetExitStatus() != 6 {
		t.Errorf("exit %v", exit)
	}
}

func TestSignalAll(t *testing.T) {
	g := newGuest(t)
	s := g.open(false, true)
	g.start("c", s, "sh", "-c", "(trap 'echo child; exit' TERM; echo ready; while :; do sleep 0.05; done) & trap 'wait; exit 7' TERM; wait")
	ready := make([]byte, 6)
	if _, err := io.ReadFull(s.stdout, ready); err != nil {
		t.Fatal(err)
	}
	if err := g.signal("c", 15, true); err != nil {
		t.Fatal(err)
	}
	g.wait("c", "")
	if out, err := io.ReadAll(s.stdout); err != nil || string(out) != "child\n" {
		t.Errorf("output %q, %v", out, err)
	}
}

func TestOOMEvent(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, false), "sleep", "1000")
	g.runtime.OOM("c") // before anybody watches, and after
	events, err := g.WatchEvents(g.ctx, &agentv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		event, err := events.Recv()
		if err != nil || event.Validate() != nil || event.GetOom().GetContainerId() != "c" {
			t.Fatal(event, err)
		}
		g.runtime.OOM("c")
	}
}

func TestManyContainers(t *testing.T) {
	g := newGuest(t)
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			id, s := fmt.Sprint("c", i), g.open(false, false)
			g.start(id, s, "sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))
			if exit := g.wait(id, ""); exit.GetExitStatus() != uint32(i) {
				t.Errorf("%s: exit %v", id, exit)
			}
			if out := s.eof(); out != fmt.Sprintln(i) {
				t.Errorf("%s: output %q", id, out)
			}
			if err := g.remove(id, ""); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func TestSandbox(t *testing.T) {
	g := newGuest(t)
	hello, err := g.Hello(g.ctx, &agentv1.HelloRequest{Version: "host"})
	if err != nil || hello.Validate() != nil || hello.GetVersion() != "test" || hello.GetKernelRelease() == "" {
		t.Fatal(hello, err)
	}
	request := &agentv1.ConfigureRequest{
		SandboxId: "s", Hostname: "pod", ClockNs: 5, Entropy: make([]byte, 8), PidsMax: 77,
		Sysctls:  []*agentv1.Sysctl{{Key: "a.b", Value: "1"}},
		Storages: []*agentv1.Storage{{Kind: agentv1.Storage_KIND_VIRTIOFS, Source: "husk", Target: "/run/husk/share"}},
	}
	if _, err := g.Configure(g.ctx, request); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Configure(g.ctx, request); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second Configure: %v", err)
	}
	if _, err := g.SyncClock(g.ctx, &agentv1.SyncClockRequest{ClockNs: 6}); err != nil {
		t.Fatal(err)
	}
	g.start("c", g.open(false, false), "sleep", "1000")
	if _, err := g.Shutdown(g.ctx, &agentv1.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	g.control.Close() // as a host does that has its answer
	if err := g.serveErr(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	want := []string{"clock 5", `hostname "pod"`, "entropy 8", "sysctl a.b=1", "mount husk on /run/husk/share readonly=false", "shm /run/husk/shm 67108864", "pids max 77", "clock 6", "sync"}
	if diff := cmp.Diff(want, g.platform.Calls()); diff != "" {
		t.Error(diff)
	}
	if pids, _ := g.runtime.Pids(g.ctx, "c"); len(pids) != 0 {
		t.Errorf("processes %v are left", pids)
	}
}

func TestDisconnect(t *testing.T) {
	g := newGuest(t)
	g.start("c", g.open(false, false), "sh", "-c", "trap '' TERM HUP; sleep 1000")
	if err := g.create("d", g.open(false, false), "true"); err != nil {
		t.Fatal(err)
	}
	g.control.Close()
	if err := g.serveErr(); !errors.Is(err, agent.ErrDisconnected) {
		t.Errorf("Serve: %v", err)
	}
	for _, id := range []string{"c", "d"} {
		if pids, _ := g.runtime.Pids(g.ctx, id); len(pids) != 0 {
			t.Errorf("processes %v of %s are left", pids, id)
		}
	}
}
