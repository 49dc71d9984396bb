package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

// commandTimeout bounds one ctr command. It is for what hangs: on a busy
// machine without KVM a start may take half a minute.
const commandTimeout = 3 * time.Minute

// An env is one test's private containerd with the runtime under test.
type env struct {
	*testing.T
	d          *daemon.Daemon
	root       string // of the repository
	generation daemon.Generation
	// logLines of containerd's log are printed when the test has failed.
	logLines int
}

func newEnv(t *testing.T, root string, g daemon.Generation) *env {
	t.Helper()
	d, err := daemon.Start(t.Context(), daemon.Config{Generation: g, Scratch: *scratchFlag, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{T: t, d: d, root: root, generation: g, logLines: 60}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of containerd's log:\n%s", d.Log(e.logLines))
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), commandTimeout)
		defer cancel()
		leftovers, err := d.Close(ctx)
		if err != nil {
			t.Errorf("tear down: %v", err)
		}
		for _, l := range leftovers {
			t.Errorf("leftover %s", l)
		}
	})
	return e
}

// A result is what a ctr command came to.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d, stdout %.4000q, stderr %.4000q", r.code, r.stdout, r.stderr)
}

// ctr runs a ctr command to its end, whatever that is.
func (e *env) ctr(args ...string) result {
	e.Helper()
	return e.start(args...).wait()
}

// must is ctr for a command that has to succeed. It returns the output.
func (e *env) must(args ...string) string {
	e.Helper()
	r := e.ctr(args...)
	if r.code != 0 {
		e.Fatalf("ctr %s: %v", strings.Join(args, " "), r)
	}
	return r.stdout
}

// runArgs completes `ctr run` for the runtime under test.
func (e *env) runArgs(args ...string) []string {
	return append([]string{"run", "--runtime", *runtimeFlag, "--fifo-dir", e.d.FIFODir()}, args...)
}

// sh runs a shell script in a busybox container, with more flags of ctr run.
func (e *env) sh(script string, flags ...string) result {
	e.Helper()
	return e.startSh("run", script, flags...).wait()
}

func (e *env) shArgs(name, script string, flags ...string) []string {
	args := append([]string{"--rm"}, flags...)
	return e.runArgs(append(args, images.Busybox, e.d.ID(name), "sh", "-c", script)...)
}

// startSh is sh without waiting for the end, and with a container name.
func (e *env) startSh(name, script string, flags ...string) *command {
	e.Helper()
	return e.start(e.shArgs(name, script, flags...)...)
}

// detached starts a container that runs a script, in the background.
func (e *env) detached(name, script string, flags ...string) (id string) {
	e.Helper()
	id = e.d.ID(name)
	args := append([]string{"-d", "--null-io"}, flags...)
	e.must(e.runArgs(append(args, images.Busybox, id, "sh", "-c", script)...)...)
	return id
}

// exec runs a command in a running container.
func (e *env) exec(id, execID string, args ...string) result {
	e.Helper()
	return e.start(e.execArgs(id, execID, args...)...).wait()
}

func (e *env) execArgs(id, execID string, args ...string) []string {
	return append([]string{"task", "exec", "--fifo-dir", e.d.FIFODir(), "--exec-id", execID, id}, args...)
}

// spec is containerd's default spec over an unpacked busybox, changed by edit.
// It returns the file's path, for `ctr run --config`: what ctr has no flag for.
func (e *env) spec(edit func(*specs.Spec)) (path string) {
	e.Helper()
	var s specs.Spec
	if err := json.Unmarshal([]byte(e.must("oci", "spec")), &s); err != nil {
		e.Fatalf("decode containerd's default spec: %v", err)
	}
	files, err := images.BusyboxRoot()
	if err != nil {
		e.Fatal(err)
	}
	root := e.TempDir()
	if err := images.Unpack(root, files); err != nil {
		e.Fatal(err)
	}
	s.Root = &specs.Root{Path: root}
	s.Process.Env = []string{"PATH=/bin"}
	// One of its own: what ends a container of runc kills all that is in its cgroup.
	s.Linux.CgroupsPath = filepath.Join("/", e.d.Token, e.d.ID("run")+"-"+filepath.Base(root))
	edit(&s)
	data, err := json.Marshal(s)
	if err != nil {
		e.Fatal(err)
	}
	path = filepath.Join(e.TempDir(), "config.json")
	e.writeFile(path, data)
	return path
}

// runSpec runs a shell script in a container of an edited default spec.
func (e *env) runSpec(script string, edit func(*specs.Spec)) result {
	e.Helper()
	path := e.spec(func(s *specs.Spec) {
		s.Process.Args = []string{"sh", "-c", script}
		edit(s)
	})
	return e.ctr(e.runArgs("--rm", "--config", path, e.d.ID("run"))...)
}

func (e *env) writeFile(path string, data []byte) {
	e.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		e.Fatal(err)
	}
}

// A command is a running ctr.
type command struct {
	e      *env
	cmd    *exec.Cmd
	stdout output
	stderr output
	cancel context.CancelFunc
	ended  chan struct{} // closed when it has ended, as err tells
	// drained is closed when stdout has all there is.
	drained chan struct{}
	err     error
}

func (e *env) start(args ...string) *command {
	e.Helper()
	c := e.prepare(args...)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	c.launch()
	return c
}

// feed runs ctr with data on standard input, which then ends. The process in
// the container first prints a line "ready", which is taken off the output: a
// ctr whose input ends while it creates the task never tells the shim.
func (e *env) feed(data []byte, args ...string) result {
	e.Helper()
	c := e.prepare(args...)
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		e.Fatal(err)
	}
	c.launch()
	c.expect("ready\n")
	if _, err := stdin.Write(data); err != nil {
		e.Errorf("write to ctr: %v", err)
	}
	if err := stdin.Close(); err != nil {
		e.Errorf("close ctr's input: %v", err)
	}
	r := c.wait()
	r.stdout = strings.TrimPrefix(r.stdout, "ready\n")
	return r
}

// prepare is start up to launch.
func (e *env) prepare(args ...string) *command {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.Context()), commandTimeout)
	c := &command{e: e, cmd: e.d.Ctr(ctx, args...), cancel: cancel, ended: make(chan struct{})}
	c.drained = c.ended
	c.stdout.changed, c.stderr.changed = make(chan struct{}), make(chan struct{})
	return c
}

func (c *command) launch() {
	c.e.Helper()
	if err := c.cmd.Start(); err != nil {
		c.cancel()
		c.e.Fatal(err)
	}
	go func() { // ends with ctr, which the context bounds
		defer close(c.ended)
		c.err = c.cmd.Wait()
	}()
}

// dumpShims has the shims print what each of their goroutines waits for, into
// containerd's log, when a command does not end. It ends them.
func (e *env) dumpShims() {
	e.Helper()
	processes, err := e.d.Processes()
	if err != nil {
		e.Errorf("look for what hangs: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.Context()), commandTimeout)
	defer cancel()
	for _, p := range processes {
		e.Logf("still there: %v", p)
		if !strings.HasPrefix(p.Name, "containerd-shim") {
			continue
		}
		if err := errors.Join(unix.Kill(p.PID, unix.SIGQUIT), daemon.WaitExit(ctx, p.PID)); err != nil {
			e.Errorf("have %v say what it waits for: %v", p, err)
		}
	}
	e.logLines = 600
}

// deprecation is what ctr 2 says of a host like this one before anything else.
var deprecation = regexp.MustCompile(`(?m)^time=.* msg="DEPRECATION: .*\n`)

// wait returns how the command ended.
func (c *command) wait() result {
	c.e.Helper()
	defer c.cancel()
	<-c.ended
	err := c.err
	r := result{c.stdout.String(), deprecation.ReplaceAllString(c.stderr.String(), ""), c.cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || r.code < 0 {
		c.e.dumpShims()
		c.e.Errorf("ctr %s: %v (limit %v): %v", strings.Join(c.cmd.Args[1:], " "), err, commandTimeout, r)
	}
	return r
}

// expect waits until the output holds text.
func (c *command) expect(text string) {
	c.e.Helper()
	if err := c.stdout.await(text, commandTimeout, c.drained); err != nil {
		select {
		case <-c.ended:
		default:
			c.e.dumpShims()
		}
		c.e.Fatalf("ctr %s: %v; stderr %q", strings.Join(c.cmd.Args[1:], " "), err, c.stderr.String())
	}
}

// An output collects what a program writes, and tells when more has come.
type output struct {
	mu      sync.Mutex
	data    []byte
	changed chan struct{} // closed and replaced at every write
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.data = append(o.data, p...)
	close(o.changed)
	o.changed = make(chan struct{})
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.data)
}

// await waits for text, at most for the limit and until no more can come.
func (o *output) await(text string, limit time.Duration, ended <-chan struct{}) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	for {
		o.mu.Lock()
		data, changed := string(o.data), o.changed
		o.mu.Unlock()
		if strings.Contains(data, text) {
			return nil
		}
		select {
		case <-changed:
		case <-ended:
			if !strings.Contains(o.String(), text) {
				return fmt.Errorf("it ended without %q; output: %.4000q", text, o.String())
			}
		case <-deadline.C:
			return fmt.Errorf("no %q in %v; output so far: %.4000q", text, limit, data)
		}
	}
}
