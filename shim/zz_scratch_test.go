package shim

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/shim/bootstrap"
	huskevents "github.com/husk-containers/husk/shim/events"
	"github.com/husk-containers/husk/virtcontainers"
)

func TestMain(m *testing.M) {
	if strings.HasPrefix(filepath.Base(os.Args[0]), "containerd-shim-") {
		os.Exit(bootstrap.Program{Name: "scratch", Cleanup: func(ctx context.Context, b string) error { return nil }, Serve: func(ctx context.Context, d *bootstrap.Daemon) error {
			if _, err := os.Stat("/tmp/shimw-fail"); err == nil {
				return os.ErrPermission
			}
			p, err := huskevents.NewPublisher(d.EventsPath, d.Namespace)
			if err != nil {
				return err
			}
			return newService(&hostSandbox{ooms: make(chan string)}, p, d.Namespace).Serve(ctx, d.Listener, d.Ready)
		}}.Run())
	}
	os.Exit(m.Run())
}

type hostSandbox struct{ ooms chan string }

func (s *hostSandbox) PID() int                   { return os.Getpid() }
func (s *hostSandbox) OOMs() <-chan string        { return s.ooms }
func (s *hostSandbox) Stop(context.Context) error { return nil }
func (s *hostSandbox) CreateContainer(_ context.Context, c virtcontainers.ContainerConfig) (container, error) {
	raw, _ := os.ReadFile(c.Bundle + "/config.json")
	var sp specs.Spec
	if err := json.Unmarshal(raw, &sp); err != nil {
		return nil, err
	}
	if sp.Process.Args[0] == "failcreate" {
		return nil, os.ErrInvalid
	}
	return &hostContainer{init: hostProcess(sp.Process, c.Stdio)}, nil
}

type hostContainer struct{ init *hp }

func (c *hostContainer) Init() initProcess { return c.init }
func (c *hostContainer) Exec(_ context.Context, id string, s *specs.Process, io virtcontainers.Stdio) (execProcess, error) {
	return hostProcess(s, io), nil
}

func (c *hostContainer) Processes(context.Context) ([]virtcontainers.ProcessInfo, error) {
	return []virtcontainers.ProcessInfo{{PID: 1}}, nil
}

func (c *hostContainer) Delete(ctx context.Context) (virtcontainers.Exit, error) {
	return c.init.Delete(ctx)
}

type hp struct {
	*fakeProcess
	cmd *exec.Cmd
	io  virtcontainers.Stdio
}

func hostProcess(s *specs.Process, io virtcontainers.Stdio) *hp {
	return &hp{newFakeProcess(), exec.Command(s.Args[0], s.Args[1:]...), io}
}

func (p *hp) Delete(context.Context) (virtcontainers.Exit, error) {
	p.exitWith(137)
	return p.Exit(), nil
}

func (p *hp) Kill(_ context.Context, sig uint32, all bool) error {
	return p.cmd.Process.Signal(syscall.Signal(sig))
}

func (p *hp) Start(ctx context.Context) error {
	var in io.WriteCloser
	if p.io.Stdin != nil {
		in, _ = p.cmd.StdinPipe()
	}
	var wg sync.WaitGroup
	cp := func(w io.WriteCloser, r io.Reader) {
		if w != nil {
			wg.Go(func() {
				io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, 128<<10))
				w.Close()
			})
		}
	}
	if p.io.Stdout != nil {
		r, _ := p.cmd.StdoutPipe()
		cp(p.io.Stdout, r)
	}
	if p.io.Stderr != nil {
		r, _ := p.cmd.StderrPipe()
		cp(p.io.Stderr, r)
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.fakeProcess.Start(ctx)
	if in != nil {
		go func() { io.Copy(in, p.io.Stdin); in.Close() }()
	}
	go func() {
		wg.Wait()
		p.cmd.Wait()
		if p.io.Stdin != nil {
			p.io.Stdin.Close()
		}
		_ = time.Now
		st := p.cmd.ProcessState.ExitCode()
		if st < 0 {
			st = 137
		}
		p.exitWith(uint32(st))
	}()
	return nil
}
