// Command rig runs a command on a host in a box: a virtual machine that has what
// many build machines lack, KVM (nested paging) and vhost-vsock, and that looks
// otherwise like the machine it is started on.
//
//	rig [flags] -- command [argument...]
//
//	 this machine (root, no KVM needed)          the box (Debian's cloud kernel)
//	+-------------------------------+           +--------------------------------+
//	| rig                           |           | init -> command                |
//	|  stdout, stderr, exit code <=============== virtio-serial, three ports     |
//	|  / ------ virtiofsd, read-only ------------> / : overlay, writes in memory |
//	|  -out DIR - virtiofsd ---------------------> /out                          |
//	|  unnamed sparse file ----------------------> /scratch : ext4, 16 GiB       |
//	|  QEMU, TCG, -cpu EPYC,+svm    |           | /dev/kvm  /dev/vhost-vsock     |
//	+-------------------------------+           | cgroup v2, all controllers     |
//	                                            +--------------------------------+
//
// Every file of this machine is there, and what the command writes is gone when
// it ends, save in /out. /tmp, /run, /dev, /proc and /sys are the box's own, so
// that a test binary to run there must not be in /tmp. containerd's root belongs
// in /scratch: overlayfs does not stack on the box's root. There is no network
// but loopback. What boots guests again and again is better off with -cpus 1: with
// more, the box's kernel hangs or dies now and then as one starts.
//
// The exit code is the command's; 124 after -timeout; 125 when the rig itself
// does not work, with the reason; 130 and 143 after SIGINT and SIGTERM. Nothing
// of the box is left behind, not even after a SIGKILL.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/husk-containers/husk/test/rig/machine"
	"golang.org/x/sys/unix"
)

// Exit codes that are not the command's.
const (
	codeUsage   = 2
	codeTimeout = 124
	codeRig     = 125
	codeSignal  = 128
)

func main() {
	cfg, timeout, err := parse(os.Args[1:])
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintf(os.Stderr, "rig: %v\n", err)
		}
		os.Exit(codeUsage)
	}
	cfg.Stdout, cfg.Stderr = os.Stdout, os.Stderr
	os.Exit(run(cfg, timeout))
}

// parse returns what the command line asks for.
func parse(args []string) (machine.Config, time.Duration, error) {
	var cfg machine.Config
	flags := flag.NewFlagSet("rig", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is printed once, by main
	flags.IntVar(&cfg.CPUs, "cpus", 2, "number of CPUs")
	flags.IntVar(&cfg.Nodes, "nodes", 1, "number of NUMA nodes, at most that of CPUs")
	flags.IntVar(&cfg.MemoryMiB, "memory", 4096, "memory in `MiB`")
	timeout := flags.Duration("timeout", 20*time.Minute, "end the command, with exit code 124, after this time")
	flags.StringVar(&cfg.Job.Dir, "dir", "", "working directory of the command (default: the current one)")
	flags.StringVar(&cfg.OutDir, "out", "", "existing `directory` that the command may write to, as /out")
	flags.StringVar(&cfg.Init, "init", "", "built test/rig/init `binary` (default: build it)")
	cfg.Job.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "HUSK_RIG=1"}
	flags.Func("env", "`KEY=VALUE` for the command's environment, which else holds PATH, HOME and HUSK_RIG; may be repeated", func(kv string) error {
		if key, _, ok := strings.Cut(kv, "="); !ok || key == "" {
			return errors.New("it is not of the form KEY=VALUE")
		}
		cfg.Job.Env = append(cfg.Job.Env, kv)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "Usage: rig [flags] -- command [argument...]")
			flags.SetOutput(os.Stderr)
			flags.PrintDefaults()
		}
		return cfg, 0, err
	}
	cfg.Job.Args = flags.Args()
	switch {
	case len(cfg.Job.Args) == 0:
		return cfg, 0, errors.New("no command given: rig [flags] -- command [argument...]")
	case cfg.CPUs < 1:
		return cfg, 0, fmt.Errorf("-cpus %d: at least 1 is needed", cfg.CPUs)
	case cfg.Nodes < 1 || cfg.Nodes > cfg.CPUs:
		return cfg, 0, fmt.Errorf("-nodes %d: from 1 to as many as CPUs, %d, are possible", cfg.Nodes, cfg.CPUs)
	case cfg.MemoryMiB < 512:
		return cfg, 0, fmt.Errorf("-memory %d: at least 512 MiB are needed", cfg.MemoryMiB)
	}
	if cfg.Job.Dir == "" {
		dir, err := os.Getwd()
		if err != nil {
			return cfg, 0, fmt.Errorf("find working directory: %w: choose one with -dir", err)
		}
		cfg.Job.Dir = dir
	}
	return cfg, *timeout, nil
}

// A signalError is the end of the rig by a signal.
type signalError struct{ unix.Signal }

func (e signalError) Error() string { return "ended by signal: " + e.Signal.String() }

// run runs the command and returns the exit code.
func run(cfg machine.Config, timeout time.Duration) int {
	errTimeout := fmt.Errorf("command still runs after %v: a longer -timeout may help", timeout)
	ctx, cancel := context.WithTimeoutCause(context.Background(), timeout, errTimeout)
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	go func() { // until the process ends
		end(signalError{(<-signals).(unix.Signal)})
	}()
	code, err := machine.Run(ctx, cfg)
	if err == nil {
		return code
	}
	fmt.Fprintf(os.Stderr, "rig: %v\n", err)
	var bySignal signalError
	switch {
	case errors.As(err, &bySignal):
		return codeSignal + int(bySignal.Signal)
	case errors.Is(err, errTimeout):
		return codeTimeout
	}
	return codeRig
}
