package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/signal"

	containerdlog "github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/internal/operator"
	"github.com/husk-containers/husk/internal/status"
)

// podFlags are those of the commands about pods.
type podFlags struct{ config, namespace string }

func (f *podFlags) add(flags *flag.FlagSet, namespace string) {
	if env := os.Getenv("CONTAINERD_NAMESPACE"); env != "" {
		namespace = env
	}
	flags.StringVar(&f.config, "config", "", "")
	flags.StringVar(&f.namespace, "n", namespace, "")
}

// with calls act with the directory of the sandboxes, until a signal comes.
func (f *podFlags) with(act func(ctx context.Context, stateDir string) error) (int, error) {
	cfg, err := config.Load(config.Path(f.config))
	if err == nil {
		err = needRoot(os.Geteuid())
	}
	if err != nil {
		return exitFailed, err
	}
	// What the ttrpc client says of a connection that has ended is in the error, or nothing.
	containerdlog.L.Logger.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := act(ctx, cfg.Runtime.StateDir); err != nil {
		return exitFailed, err
	}
	return exitOK, nil
}

// statusAction is status, once the flags have been parsed.
func statusAction(flags *flag.FlagSet, stdout io.Writer) func() (int, error) {
	var f podFlags
	f.add(flags, "")
	asJSON := flags.Bool("json", false, "")
	return func() (int, error) {
		return f.with(func(ctx context.Context, dir string) error {
			host := status.Host{StateDir: dir, Proc: "/proc", Sys: "/sys", Ask: operator.Status}
			if flags.NArg() == 0 {
				pods, err := host.Pods(ctx, f.namespace)
				if err != nil {
					return err
				}
				return write(stdout, *asJSON, pods, status.WriteTable)
			}
			pod, err := host.Pod(ctx, f.namespace, flags.Arg(0))
			if err != nil {
				return err
			}
			return write(stdout, *asJSON, pod, status.WritePod)
		})
	}
}

func write[T any](w io.Writer, asJSON bool, v T, text func(io.Writer, T) error) error {
	if asJSON {
		return json.NewEncoder(w).Encode(v)
	}
	return text(w, v)
}

func needRoot(euid int) error {
	if euid != 0 {
		return errors.New("the pods' processes and the sockets of their shims are root's alone: run this as root")
	}
	return nil
}
