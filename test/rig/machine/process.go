package machine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
)

// stderrLines of a program are shown where it ended unasked. QEMU begins with a
// dozen warnings of what TCG does not emulate.
const stderrLines = 4

// A command is a program to start.
type command struct {
	path string
	args []string
	// env is added to this process's environment.
	env []string
	// files become the descriptors from 3 on.
	files []*os.File
	// prepare, if not nil, runs on the thread that starts the program.
	prepare func() error
}

// A process is a running program. It does not outlive this one, even when this
// one is killed.
type process struct {
	name string
	cmd  *exec.Cmd
	// done is closed when the process has ended; err is valid then and not nil.
	done chan struct{}
	err  error
}

// start starts c. One goroutine belongs to each process and ends with it.
func start(c command) (*process, error) {
	p := &process{name: filepath.Base(c.path), cmd: exec.Command(c.path, c.args...), done: make(chan struct{})}
	var stderr tail
	p.cmd.Env = append(os.Environ(), c.env...)
	p.cmd.ExtraFiles = c.files
	p.cmd.Stderr = &stderr
	// A process group of its own keeps a terminal's ^C away from the child: this
	// process decides when it ends.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	go func() {
		// The death signal comes when the starting thread ends, so the thread must
		// be this goroutine's alone. It is never unlocked: it ends with the
		// goroutine, and with it what prepare did to it.
		runtime.LockOSThread()
		if c.prepare != nil {
			if err := c.prepare(); err != nil {
				started <- err
				return
			}
		}
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.cmd.Wait() //nolint:errcheck // ProcessState tells more
		p.err = fmt.Errorf("%v%s", p.cmd.ProcessState, stderr.quote(stderrLines))
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	return p, nil
}

// kill ends the process and returns when it has ended.
func (p *process) kill() {
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended
	<-p.done
}

// run runs c to its end; another exit code than 0 is an error.
func run(ctx context.Context, c command) error {
	p, err := start(c)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
		return fmt.Errorf("run %s: %w", p.name, context.Cause(ctx))
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("run %s: %w", p.name, p.err)
	}
	return nil
}

const qemuName = "qemu-system-x86_64"

// programs are the paths of what the rig starts.
type programs struct {
	qemu, virtiofsd, mkfs string
}

func findPrograms() (programs, error) {
	var p programs
	for _, program := range []struct {
		path       *string
		remedy     string
		candidates []string
	}{
		{&p.qemu, "apt-get install qemu-system-x86", []string{qemuName}},
		{
			&p.virtiofsd, "apt-get install qemu-system-common (Debian 12) or virtiofsd (Debian 13)",
			[]string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "virtiofsd"},
		},
		{&p.mkfs, "apt-get install e2fsprogs", []string{"mkfs.ext4", "/sbin/mkfs.ext4"}},
	} {
		for _, candidate := range program.candidates {
			if path, err := exec.LookPath(candidate); err == nil {
				*program.path = path
				break
			}
		}
		if *program.path == "" {
			return p, fmt.Errorf("find %s: not installed: %s", filepath.Base(program.candidates[0]), program.remedy)
		}
	}
	return p, nil
}
