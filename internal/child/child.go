// Package child runs host helper processes that cannot outlive this one.
package child

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// defaultStderrLimit is what is kept of a child's output, in bytes.
	defaultStderrLimit = 16 << 10
	// outputDelay bounds how long a child's own children that hold its stderr
	// can put off Done.
	outputDelay = 250 * time.Millisecond
	// killTimeout is how long a process may take to end after SIGKILL. Only one
	// that the kernel holds in an uninterruptible call takes any time at all.
	killTimeout = 5 * time.Second
	// secbitNoSetuidFixup is the kernel's SECBIT_NO_SETUID_FIXUP.
	secbitNoSetuidFixup = 1 << 2
)

// A Spec says what to run and as whom.
type Spec struct {
	// Path of the program. There is no search along PATH.
	Path string
	// Args follow the program's name, which is Path.
	Args []string
	// Env is the whole environment; empty means an empty one.
	Env []string
	// Dir is the working directory; empty means the caller's.
	Dir string
	// ExtraFiles become descriptors 3, 4, ... No other descriptor but 0, 1
	// and 2 is passed on. The caller keeps its own copies.
	ExtraFiles []*os.File
	// UID, GID and Groups to run as, without capabilities. When all are zero the
	// caller's credentials are kept, but with NoCapabilities, which leaves root, too,
	// without any, and without the caller's groups.
	UID, GID       int
	Groups         []int
	NoCapabilities bool
	// Namespaces to create, as CLONE_NEW* flags. A new mount namespace keeps the
	// propagation of the caller's mounts, so that it follows later unmounts and
	// pins nothing. In a new pid namespace the child is pid 1: its descendants
	// cannot outlive it.
	Namespaces uintptr
	// NoNewPrivs keeps the child from gaining privileges by execve.
	NoNewPrivs bool
	// KeepCapabilities lets the child keep its capabilities when it takes another
	// user's id: what the kernel calls SECBIT_NO_SETUID_FIXUP.
	KeepCapabilities bool
	// StderrLimit is how much of the end of the output is kept, in bytes; zero
	// means 16 KiB.
	StderrLimit int
}

// A Child is a process started by Start. Its methods are safe for concurrent use.
type Child struct {
	path      string
	process   *os.Process
	startTime uint64
	output    *tail
	done      chan struct{}
	status    string // written before done is closed
}

// Start runs a program with stdin from /dev/null and its output kept for Stderr.
// The kernel kills it with SIGKILL when this process ends, however it ends. It
// is no better protected from the OOM killer than by default. Neither it nor, from
// then on, this process dumps core.
func Start(spec Spec) (*Child, error) {
	limit := spec.StderrLimit
	if limit <= 0 {
		limit = defaultStderrLimit
	}
	c := &Child{path: spec.Path, output: &tail{limit: limit}, done: make(chan struct{})}
	started := make(chan error, 1)
	go c.run(spec, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Path, err)
	}
	return c, nil
}

// run is the life of a child. The parent-death signal is sent when the *thread*
// that forked ends, so this one stays with its child to the end; and it is never
// unlocked, because no_new_privs cannot be taken off it again. What is set on the thread
// before it forks is its child's alone.
func (c *Child) run(spec Spec, started chan<- error) {
	runtime.LockOSThread()
	cmd := spec.command()
	cmd.Stdout, cmd.Stderr = c.output, c.output
	if err := c.spawn(cmd, spec); err != nil {
		started <- err
		return
	}
	started <- nil
	err := cmd.Wait()
	c.status = status(cmd.ProcessState, err)
	close(c.done)
}

func (c *Child) spawn(cmd *exec.Cmd, spec Spec) error {
	if spec.NoCapabilities {
		if err := boundCapabilities(); err != nil {
			return fmt.Errorf("give up capabilities: %w", err)
		}
	}
	if spec.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
	}
	if spec.KeepCapabilities {
		if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbitNoSetuidFixup, 0, 0, 0); err != nil {
			return fmt.Errorf("set the bit no_setuid_fixup: %w", err)
		}
	}
	// A helper's memory is its guest's, and what this process holds is too. Set
	// here, there is no moment at which the child has another limit.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	// Descriptors that this process inherited may lack close-on-exec.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark descriptors close-on-exec (needs Linux 5.11): %w", err)
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.process = cmd.Process
	var err error
	// Not reaped yet: it is there.
	if c.startTime, err = StartTime(cmd.Process.Pid); err == nil {
		err = exposeToOOM(cmd.Process.Pid)
	}
	if err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	return nil
}

// boundCapabilities has the programs that the calling thread executes get no
// capability, whoever they run as. The thread keeps its own.
func boundCapabilities() error {
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > 0 { // the kernel has no more
			break
		}
		if err != nil {
			return err
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return unix.Capset(&header, &data[0])
}

// exposeToOOM takes from a process the protection from the OOM killer that it
// inherited: it is a guest that decides how much memory it takes.
func exposeToOOM(pid int) error {
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	score, err := os.ReadFile(path)
	if err == nil && strings.HasPrefix(string(score), "-") {
		err = os.WriteFile(path, []byte("0"), 0)
	}
	if err != nil {
		return fmt.Errorf("set OOM score: %w", err)
	}
	return nil
}

func (spec Spec) command() *exec.Cmd {
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: spec.Namespaces}
	if spec.UID != 0 || spec.GID != 0 || len(spec.Groups) > 0 || spec.NoCapabilities {
		attr.Credential = &syscall.Credential{Uid: uint32(spec.UID), Gid: uint32(spec.GID)}
		for _, g := range spec.Groups {
			attr.Credential.Groups = append(attr.Credential.Groups, uint32(g))
		}
	}
	return &exec.Cmd{
		Path:        spec.Path,
		Args:        append([]string{spec.Path}, spec.Args...),
		Env:         append([]string{}, spec.Env...), // nil would inherit ours
		Dir:         spec.Dir,
		ExtraFiles:  spec.ExtraFiles,
		SysProcAttr: attr,
		WaitDelay:   outputDelay,
	}
}

func status(state *os.ProcessState, err error) string {
	if state == nil {
		return fmt.Sprintf("unknown: %v", err)
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return "killed by " + unix.SignalName(ws.Signal())
	}
	return fmt.Sprintf("exit status %d", state.ExitCode())
}

// PID is the process id in this process's pid namespace.
func (c *Child) PID() int { return c.process.Pid }

// StartTime is when the child started, in clock ticks since boot: with the pid
// it names the process for good. See KillRecorded.
func (c *Child) StartTime() uint64 { return c.startTime }

// Done is closed when the child has ended and its output is in Stderr.
func (c *Child) Done() <-chan struct{} { return c.done }

// Status says how the child ended, such as "exit status 1" or "killed by
// SIGKILL", and "running" before that.
func (c *Child) Status() string {
	select {
	case <-c.done:
		return c.status
	default:
		return "running"
	}
}

// Stderr is the end of what the child wrote to stdout and stderr, with control
// characters other than newline and tab escaped.
func (c *Child) Stderr() string { return c.output.String() }

// Cause is Status and the last lines of Stderr in one line of bounded length.
func (c *Child) Cause() string {
	const maxLines, maxBytes = 5, 600
	lines := strings.FieldsFunc(c.Stderr(), func(r rune) bool { return r == '\n' })
	if len(lines) > maxLines {
		lines = lines[len(lines)-maxLines:]
	}
	text := strings.Join(lines, "; ")
	if over := len(text) - maxBytes; over > 0 {
		text = "..." + strings.ToValidUTF8(text[over:], "")
	}
	if text == "" {
		return c.Status()
	}
	return c.Status() + ": " + text
}

// Kill sends SIGKILL and does not wait. It does nothing once the child has ended.
func (c *Child) Kill() {
	_ = c.process.Kill() // by pidfd: only "already ended" is possible
}

// Stop sends sig and waits for the child's end; when ctx ends first it kills.
// It is idempotent, and fails only where the kernel does not let go of the
// process.
func (c *Child) Stop(ctx context.Context, sig syscall.Signal) error {
	if ctx.Err() == nil {
		if err := c.process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("send %s to %s (pid %d): %w", unix.SignalName(sig), c.path, c.PID(), err)
		}
		select {
		case <-c.done:
			return nil
		case <-ctx.Done():
		}
	}
	c.Kill()
	timeout := time.NewTimer(killTimeout)
	defer timeout.Stop()
	select {
	case <-c.done:
		return nil
	case <-timeout.C:
		return fmt.Errorf("stop %s: pid %d has not ended %s after SIGKILL", c.path, c.PID(), killTimeout)
	}
}

// A tail keeps the end of what is written to it.
type tail struct {
	limit int

	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p[max(0, len(p)-t.limit):]...)
	if over := len(t.buf) - t.limit; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return escape(string(t.buf))
}
