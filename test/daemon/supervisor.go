package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// supervisorEnv marks the process that Supervise turns into a supervisor.
const supervisorEnv = "HUSK_TEST_SUPERVISOR"

// Values of supervisorEnv: in the machine's network namespace, or a new one.
const (
	shared   = "shared"
	isolated = "isolated"
)

// Supervise turns the process into the supervisor of one private containerd
// where it was started as that, and then does not return. A program that uses
// this package calls it first of all.
//
// The supervisor is a child subreaper: whatever descends from its containerd,
// however it detached itself, stays below it, so that what is left at the end
// can be told from what the machine runs otherwise. When its standard input
// ends, which also happens when its parent dies, it kills all of it.
func Supervise() {
	if os.Getenv(supervisorEnv) == "" {
		return
	}
	if err := supervise(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "supervise containerd: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A launch asks the supervisor to start one program.
type launch struct {
	Args []string
	Env  []string
	Log  string // appended to: standard output and standard error
}

// launched answers a launch.
type launched struct {
	PID   int
	Error string
}

func supervise(requests io.Reader, answers io.Writer) error {
	// A signal of the terminal is for the parent, which then tears down. It is not
	// ignored: children would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	if os.Getenv(supervisorEnv) == isolated {
		if err := loopbackUp(); err != nil {
			return err
		}
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() { // ends with the process
		for range children {
			reap()
		}
	}()
	decoder, encoder := json.NewDecoder(bufio.NewReader(requests)), json.NewEncoder(answers)
	for {
		var l launch
		if err := decoder.Decode(&l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		var answer launched
		pid, err := spawn(l)
		if err != nil {
			answer.Error = err.Error()
		}
		answer.PID = pid
		if err := encoder.Encode(answer); err != nil {
			return fmt.Errorf("write answer: %w", err)
		}
	}
	return killDescendants(os.Getpid())
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

func reap() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
	}
}

func spawn(l launch) (int, error) {
	path, err := exec.LookPath(l.Args[0])
	if err != nil {
		return 0, err
	}
	log, err := os.OpenFile(l.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	return syscall.ForkExec(path, l.Args, &syscall.ProcAttr{
		Env:   l.Env,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
}

// killDescendants returns when pid has no descendants any more.
func killDescendants(pid int) error {
	for {
		left, err := Descendants(pid)
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		for _, p := range left {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill %v: %w", p, err)
			}
		}
		runtime.Gosched()
	}
}

// A supervisor is the parent's end.
type supervisor struct {
	cmd      *exec.Cmd
	requests io.WriteCloser
	encoder  *json.Encoder
	decoder  *json.Decoder
}

// startSupervisor starts a supervisor, if so wanted in a network namespace of
// its own.
func startSupervisor(ownNetwork bool) (*supervisor, error) {
	cmd := exec.Command("/proc/self/exe")
	mode := shared
	if ownNetwork {
		mode = isolated
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	}
	cmd.Env = append(os.Environ(), supervisorEnv+"="+mode)
	cmd.Stderr = os.Stderr
	requests, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	answers, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	return &supervisor{cmd: cmd, requests: requests, encoder: json.NewEncoder(requests), decoder: json.NewDecoder(answers)}, nil
}

// start runs a program below the supervisor and returns its pid.
func (s *supervisor) start(l launch) (int, error) {
	if err := s.encoder.Encode(l); err != nil {
		return 0, fmt.Errorf("ask supervisor: %w", err)
	}
	var answer launched
	if err := s.decoder.Decode(&answer); err != nil {
		return 0, fmt.Errorf("hear supervisor: %w", err)
	}
	if answer.Error != "" {
		return 0, fmt.Errorf("start %s: %s", l.Args[0], answer.Error)
	}
	return answer.PID, nil
}

// close kills everything below the supervisor, and ends it.
func (s *supervisor) close() error {
	return errors.Join(s.requests.Close(), s.cmd.Wait())
}
