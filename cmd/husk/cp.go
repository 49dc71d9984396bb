package main

import (
	"context"
	"flag"
	"io"
	"os"
	"os/signal"

	containerdlog "github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/internal/archive"
	"github.com/husk-containers/husk/internal/cp"
)

const copyUsage = `husk cp - copy files between the host and a container that runs

Usage:
  husk cp [-n NAMESPACE] [-config FILE] [-max-entries N] [-max-bytes N] SRC DST

One of SRC and DST is CONTAINER:PATH, with the container's whole id; its PATH begins
at the container's root. The other is a path of the host, or - for a tar on standard
input or output. A path of the host that has a colon is written ./a:b.

  husk cp -n k8s.io ID:/etc/hosts .           a file into a directory
  husk cp -n k8s.io data ID:/srv              directory data as /srv/data
  husk cp -n k8s.io data/. ID:/srv            what is in data, into /srv
  husk cp -n k8s.io ID:/var/log - | tar -t    a tar on standard output

A directory that exists is copied into; another DST is the copy's new name, and ends
with / only where SRC is a directory. Links are copied as links. Owners are kept by
number, modes and times too. What comes out of a container loses set-user-ID and
set-group-ID bits and never leaves DST; extended attributes are not copied, and
devices, sockets and FIFOs are refused.

  -n NAMESPACE      containerd's; default: CONTAINERD_NAMESPACE, or else "default".
                    That of Kubernetes is k8s.io
  -config FILE      Husk's configuration, as for husk check: its runtime.state_dir
                    is where the sandboxes are
  -max-entries N    most files and directories that may come out; default 1000000
  -max-bytes N      most bytes that may come out; default 68719476736 (64 GiB)

It runs as root, as the shim does. Exit status: 0 all was copied, 1 not, 2 wrong usage.
`

// copyAction is cp, once the flags have been parsed.
func copyAction(flags *flag.FlagSet, stdout io.Writer) func() (int, error) {
	namespace := "default"
	if env := os.Getenv("CONTAINERD_NAMESPACE"); env != "" {
		namespace = env
	}
	var limits archive.Limits
	file := flags.String("config", "", "")
	flags.StringVar(&namespace, "n", namespace, "")
	flags.IntVar(&limits.Entries, "max-entries", 1_000_000, "")
	flags.Int64Var(&limits.Bytes, "max-bytes", 64<<30, "")
	return func() (int, error) {
		cfg, err := config.Load(config.Path(*file))
		if err != nil {
			return exitFailed, err
		}
		// What the ttrpc client says of a stream that has ended is in the error, or nothing.
		containerdlog.L.Logger.SetOutput(io.Discard)
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		o := cp.Options{StateDir: cfg.Runtime.StateDir, Namespace: namespace, Limits: limits, Stdin: os.Stdin, Stdout: stdout}
		if err := cp.Copy(ctx, o, flags.Arg(0), flags.Arg(1)); err != nil {
			return exitFailed, err
		}
		return exitOK, nil
	}
}
