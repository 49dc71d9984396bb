// Package machine boots the rig's virtual machine, has it run one job and ends
// it, leaving nothing behind.
package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/husk-containers/husk/test/rig/job"
)

// A Config is a machine and what to run in it.
type Config struct {
	Job job.Job
	// CPUs is at least 1.
	CPUs int
	// Nodes are the NUMA nodes that CPUs and memory are spread over; at most CPUs.
	// 0 is 1.
	Nodes int
	// MemoryMiB of the machine; half of it takes writes to the root.
	MemoryMiB int
	// OutDir is a host directory that the job may write to, at /out; may be
	// empty.
	OutDir string
	// Init is the binary of test/rig/init; where empty it is built, which needs
	// Go and a working directory in this module.
	Init string
	// Stdout and Stderr get the job's output.
	Stdout, Stderr io.Writer
}

// Run boots the machine, runs the job and returns its exit code. It ends, with
// the cause of ctx, when ctx does; the error then holds the console's last
// lines. When it returns, every process, socket and file of the machine is gone;
// a write to cfg.Stdout or cfg.Stderr that blocks may outlast it after an error.
func Run(ctx context.Context, cfg Config) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("start rig: it shares all of the root file system: run it as root")
	}
	cfg.Job.Out = cfg.OutDir != ""
	if stat, err := os.Stat(cfg.OutDir); cfg.Job.Out && (err != nil || !stat.IsDir()) {
		return 0, fmt.Errorf("share %s: it is not an existing directory: make it first", cfg.OutDir)
	}
	m := &machine{
		ends:       make(chan end),
		traffic:    make(chan traffic),
		result:     make(chan job.Result, 1),
		consoleEnd: make(chan struct{}),
		done:       make(chan struct{}),
	}
	defer func() { m.stop() }()
	if err := m.start(ctx, cfg); err != nil {
		return 0, err
	}
	return m.follow(ctx)
}

// consoleLines hold a kernel's last words.
const consoleLines = 40

// A machine is one run. Its goroutines end once stop has closed done, ended the
// processes and closed the host's ends of the ports.
type machine struct {
	processes []*process
	hostEnds  []net.Conn
	console   tail

	ends       chan end
	traffic    chan traffic
	result     chan job.Result
	consoleEnd chan struct{} // closed when console holds all there will be
	done       chan struct{}
}

// An end tells that a process has ended.
type end struct {
	name  string
	clean bool // exit code 0
	err   error
}

// traffic tells that n bytes came through a port, or that they cannot be passed
// on.
type traffic struct {
	port string
	n    int64
	err  error
}

func (m *machine) start(ctx context.Context, cfg Config) error {
	programs, err := findPrograms()
	if err != nil {
		return err
	}
	kernel, initrd, err := bootFiles(ctx, cfg)
	if err != nil {
		return err
	}
	defer initrd.Close()
	scratch, err := newScratch(ctx, programs.mkfs)
	if err != nil {
		return err
	}
	defer scratch.Close()
	files := []*os.File{initrd, scratch}

	for _, use := range []func(io.Reader){m.watchConsole, m.readResult, m.relay(job.OutPort, cfg.Stdout), m.relay(job.ErrPort, cfg.Stderr)} {
		host, guest, err := socketPair()
		if err != nil {
			return err
		}
		defer guest.Close()
		m.hostEnds = append(m.hostEnds, host)
		files = append(files, guest)
		go use(host)
	}
	shares := []share{{dir: "/", readOnly: true}}
	if cfg.OutDir != "" {
		shares = append(shares, share{dir: cfg.OutDir})
	}
	for _, s := range shares {
		p, socket, err := s.serve(programs.virtiofsd)
		if err != nil {
			return err
		}
		defer socket.Close()
		files = append(files, socket)
		m.own(p)
	}
	p, err := start(command{path: programs.qemu, args: arguments(kernel, cfg), files: files})
	if err != nil {
		return err
	}
	m.own(p)
	return nil
}

// own has p ended by stop, and its end reported.
func (m *machine) own(p *process) {
	m.processes = append(m.processes, p)
	go func() {
		<-p.done
		select {
		case m.ends <- end{p.name, p.cmd.ProcessState.Success(), p.err}:
		case <-m.done:
		}
	}()
}

// follow returns when the job has ended and all of its output is passed on.
func (m *machine) follow(ctx context.Context) (int, error) {
	var result *job.Result
	seen := map[string]int64{}
	for result == nil || seen[job.OutPort] < result.Stdout || seen[job.ErrPort] < result.Stderr {
		select {
		case r := <-m.result:
			result = &r
		case t := <-m.traffic:
			if t.err != nil {
				return 0, fmt.Errorf("pass on the command's output: %w", t.err)
			}
			seen[t.port] += t.n
		case e := <-m.ends:
			if e.clean && e.name != qemuName {
				continue // a virtiofsd whose QEMU has ended: that is the news
			}
			if e.name == qemuName {
				<-m.consoleEnd
			}
			return 0, fmt.Errorf("run machine: %s ended before the command: %w%s", e.name, e.err, m.console.quote(consoleLines))
		case <-ctx.Done():
			return 0, fmt.Errorf("run machine: %w%s", context.Cause(ctx), m.console.quote(consoleLines))
		}
	}
	return result.Code, nil
}

// stop ends everything. QEMU was started last and ends first: the others then
// have nobody left to serve.
func (m *machine) stop() {
	close(m.done)
	for i := len(m.processes) - 1; i >= 0; i-- {
		m.processes[i].kill()
	}
	for _, c := range m.hostEnds {
		c.Close()
	}
}

func (m *machine) watchConsole(r io.Reader) {
	defer close(m.consoleEnd)
	io.Copy(&m.console, r) //nolint:errcheck // ends with the machine
}

func (m *machine) readResult(r io.Reader) {
	var result job.Result
	// An error is the end of the machine, which follow hears of by itself.
	if json.NewDecoder(r).Decode(&result) == nil {
		m.result <- result
	}
}

// relay returns what passes a port's bytes on to w.
func (m *machine) relay(port string, w io.Writer) func(io.Reader) {
	return func(r io.Reader) {
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Read(buf)
			if n == 0 && err != nil {
				return
			}
			_, err = w.Write(buf[:n])
			select {
			case m.traffic <- traffic{port, int64(n), err}:
			case <-m.done:
				return
			}
			if err != nil {
				return
			}
		}
	}
}
