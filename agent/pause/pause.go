// Package pause makes the PID namespace that the containers of a pod share.
package pause

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/reap"
)

// A Namespace is a PID namespace at a path of the file system, whose first
// process is this program called again. It is made when it is first needed, and
// again where its first process has been killed: the kernel has then killed all
// others in it.
type Namespace struct {
	path    string
	command []string
	table   *reap.Table
	turn    chan struct{} // holds one token while nobody makes the namespace

	// What follows is the holder's of the token.
	first *reap.Process // nil: not made
	alive *os.File      // its end is the first process's
}

// New returns a Namespace that will be at path. command is a program and its
// arguments that calls Main; table owns the process.
func New(path string, command []string, table *reap.Table) *Namespace {
	n := &Namespace{path: path, command: command, table: table, turn: make(chan struct{}, 1)}
	n.turn <- struct{}{}
	return n
}

// Path is where the namespace is, once Make has returned.
func (n *Namespace) Path() string { return n.path }

// Make sees to it that the namespace is there.
func (n *Namespace) Make(ctx context.Context) error {
	select {
	case <-n.turn:
		defer func() { n.turn <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("make shared PID namespace: %w", context.Cause(ctx))
	}
	if n.first != nil {
		select {
		case <-n.first.Done():
			n.forget()
		default:
			return nil
		}
	}
	if err := n.start(ctx); err != nil {
		return fmt.Errorf("make shared PID namespace: %w", err)
	}
	return nil
}

// Close ends the namespace and all that is in it, and returns when that is gone.
func (n *Namespace) Close() error {
	<-n.turn
	defer func() { n.turn <- struct{}{} }()
	if n.first == nil {
		return nil
	}
	err := n.first.Signal(syscall.SIGKILL)
	<-n.first.Done()
	n.forget()
	if err != nil && err != os.ErrProcessDone {
		return fmt.Errorf("end shared PID namespace: %w", err)
	}
	return nil
}

// forget takes away what the first process, which has ended, leaves.
func (n *Namespace) forget() {
	unix.Unmount(n.path, unix.MNT_DETACH) //nolint:errcheck // only the path is lost, and start says so
	n.alive.Close()
	n.first, n.alive = nil, nil
}

// start starts the first process and binds its namespace to the path.
func (n *Namespace) start(ctx context.Context) error {
	if err := touch(n.path); err != nil {
		return err
	}
	// The process ends when it reads the end of its standard input. A
	// parent-death signal would come with the end of a mere thread.
	stdin, alive, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	ready, told, err := os.Pipe()
	if err != nil {
		alive.Close()
		return err
	}
	defer ready.Close()
	cmd := exec.Command(n.command[0], n.command[1:]...)
	cmd.Args[0] = "husk-agent" // whatever the path that leads to it
	cmd.Env = []string{}       // nothing of ours
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, told, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Setsid: true}
	first, err := n.table.Start(cmd)
	told.Close()
	if err != nil {
		alive.Close()
		return err
	}
	n.first, n.alive = first, alive
	stop := context.AfterFunc(ctx, func() { first.Signal(syscall.SIGKILL) }) //nolint:errcheck // it may have ended
	_, err = ready.Read(make([]byte, 1))
	if !stop() {
		err = context.Cause(ctx)
	} else if err != nil {
		err = fmt.Errorf("its first process has not come up: %w", err)
	}
	if err == nil {
		err = bind(first.PID(), n.path)
	}
	if err != nil {
		first.Signal(syscall.SIGKILL) //nolint:errcheck // likewise
		<-first.Done()
		n.forget()
	}
	return err
}

// touch makes an empty file to mount on.
func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	return f.Close()
}

func bind(pid int, path string) error {
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/pid", pid), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind it to %s: %w", path, err)
	}
	return nil
}
