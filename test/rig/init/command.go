package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/husk-containers/husk/test/rig/job"
	"golang.org/x/sys/unix"
)

// Exit codes of a command that never ran, as a shell has them.
const (
	codeNotRunnable = 126
	codeNotFound    = 127
)

// execute runs the job's command to its end, and ends whatever it left running.
// What the command writes goes to stdout and stderr; so does the reason where it
// does not start.
func execute(j job.Job, stdout, stderr io.Writer) (job.Result, error) {
	outCopy, err := newRelay(stdout)
	if err != nil {
		return job.Result{}, err
	}
	errCopy, err := newRelay(stderr)
	if err != nil {
		return job.Result{}, err
	}
	code := 0
	pid, startErr := start(j, outCopy.pipe, errCopy.pipe)
	if startErr != nil {
		code = startCode(startErr)
		fmt.Fprintf(errCopy.pipe, "rig: %v\n", startErr) //nolint:errcheck // a fresh pipe with room for it
	}
	outCopy.pipe.Close()
	errCopy.pipe.Close()
	if startErr == nil {
		if code, err = reap(pid); err != nil {
			return job.Result{}, err
		}
	}
	result := job.Result{Code: code}
	if result.Stdout, err = outCopy.wait(); err != nil {
		return job.Result{}, err
	}
	if result.Stderr, err = errCopy.wait(); err != nil {
		return job.Result{}, err
	}
	return result, nil
}

// startCode is the exit code of a command that start did not start.
func startCode(err error) int {
	var lookup *exec.Error
	if errors.As(err, &lookup) && (errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist)) {
		return codeNotFound
	}
	return codeNotRunnable
}

// start starts the command in a session of its own and returns its pid.
func start(j job.Job, stdout, stderr *os.File) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	if err := os.Chdir(j.Dir); err != nil {
		return 0, fmt.Errorf("%w: the rig shows the host's files except those in /tmp, /run, /dev, /proc and /sys: choose another -dir", err)
	}
	os.Clearenv()
	for _, kv := range j.Env {
		key, value, _ := strings.Cut(kv, "=")
		if err := os.Setenv(key, value); err != nil {
			return 0, fmt.Errorf("set %s: %w", key, err)
		}
	}
	path, err := exec.LookPath(j.Args[0])
	if err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(path, j.Args, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{null.Fd(), stdout.Fd(), stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, &fs.PathError{Op: "exec", Path: path, Err: err}
	}
	return pid, nil
}

// reap collects every process that ends until none is left, and returns the exit
// code of pid. With pid's end it kills the others: every process that there is,
// as only PID 1 may.
func reap(pid int) (code int, err error) {
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			return code, nil
		case err != nil:
			return 0, fmt.Errorf("wait for processes: %w", err)
		case ended == pid:
			code = status.ExitStatus()
			if status.Signaled() {
				code = 128 + int(status.Signal())
			}
			unix.Kill(-1, unix.SIGKILL) //nolint:errcheck // ESRCH where none is left
		}
	}
}

// A relay copies from a pipe to a port. It is not the port itself that the
// command has, as a port opens once only and /dev/stdout must open again.
type relay struct {
	pipe  *os.File // what the command writes to
	done  chan error
	count int64
}

// newRelay starts a relay; it ends when every copy of its pipe is closed.
func newRelay(port io.Writer) (*relay, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	r := &relay{pipe: os.NewFile(uintptr(fds[1]), "pipe"), done: make(chan error, 1)}
	go func() {
		from := os.NewFile(uintptr(fds[0]), "pipe")
		defer from.Close()
		var err error
		// Only Write is shown: a port takes no spliced pages.
		r.count, err = io.Copy(struct{ io.Writer }{port}, struct{ io.Reader }{from})
		r.done <- err
	}()
	return r, nil
}

// wait returns the number of bytes copied, all of them.
func (r *relay) wait() (int64, error) {
	if err := <-r.done; err != nil {
		return 0, fmt.Errorf("copy output: %w", err)
	}
	return r.count, nil
}
