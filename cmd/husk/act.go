package main

import (
	"context"
	"flag"
	"fmt"
	"io"

	"github.com/husk-containers/husk/internal/operator"
	"github.com/husk-containers/husk/internal/statedir"
)

const reclaimText = `Its
guest gives up memory that it does not need, such as the cache of files, and all of the
VM's memory stays at its disposal. What the host held for the VM before and after is
printed. It ends when the guest gives no more, after a minute at most.`

const pauseText = `Every
vCPU stands still and uses no CPU of the host; memory and connections stay. Calls that
need the guest, such as exec and probes, fail until husk resume. It is an error where the
pod does not run.`

const resumeText = `It
goes on where husk pause has stopped it, with the host's time. It is an error where the
pod is not paused.`

func reclaim(ctx context.Context, shim statedir.Shim) (string, error) {
	before, after, err := operator.Reclaim(ctx, shim)
	return fmt.Sprintf("holds %d MiB of the host, and held %d MiB before", after, before), err
}

func pause(ctx context.Context, shim statedir.Shim) (string, error) {
	return "is paused", operator.Pause(ctx, shim)
}

func resume(ctx context.Context, shim statedir.Shim) (string, error) {
	return "runs", operator.Resume(ctx, shim)
}

// podAction is a command that has one pod do something, of which it returns what is to be
// told.
func podAction(flags *flag.FlagSet, stdout io.Writer, act func(ctx context.Context, shim statedir.Shim) (string, error)) func() (int, error) {
	var f podFlags
	f.add(flags, "default")
	return func() (int, error) {
		return f.with(func(ctx context.Context, dir string) error {
			shim, err := statedir.Find(dir, f.namespace, flags.Arg(0))
			if err != nil {
				return err
			}
			done, err := act(ctx, shim)
			if err != nil {
				return fmt.Errorf("pod %s/%s: %w", shim.Namespace, shim.Sandbox, err)
			}
			_, err = fmt.Fprintf(stdout, "%s/%s %s\n", shim.Namespace, shim.Sandbox, done)
			return err
		})
	}
}
