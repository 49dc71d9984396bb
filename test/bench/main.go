// Command bench measures Husk beside runc, by one private containerd in one run,
// and prints the tables of docs/numbers.md. Run it on a machine that does nothing
// else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

const (
	husk = "io.containerd.husk.v2"
	runc = "io.containerd.runc.v2"
)

func main() {
	daemon.Supervise()
	generation := flag.String("containerd", "1.6", "`generation` of containerd: 1.6 or 2.4")
	scratch := flag.String("scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
	pairs := flag.Int("pairs", 10, "number of starts of each runtime")
	execs := flag.Int("execs", 50, "number of execs in each runtime")
	mebibytes := flag.Int("mib", 256, "size of a stream, in MiB")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := measure(ctx, *generation, *scratch, *pairs, *execs, *mebibytes); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, generation, scratch string, pairs, execs, mebibytes int) (err error) {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	g, err := daemon.Lookup(root, generation)
	if err != nil {
		return err
	}
	d, err := daemon.Start(ctx, daemon.Config{Generation: g, Root: root, Scratch: scratch})
	if err != nil {
		return err
	}
	defer func() {
		leftovers, closeErr := d.Close(context.WithoutCancel(ctx))
		if len(leftovers) > 0 {
			closeErr = errors.Join(closeErr, fmt.Errorf("left behind: %s", strings.Join(leftovers, "; ")))
		}
		err = errors.Join(err, closeErr)
	}()
	b := &bench{d: d}
	if err := b.machine(ctx, os.Stdout, g); err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return b.starts(ctx, os.Stdout, pairs) },
		func() error { return b.execs(ctx, os.Stdout, execs) },
		func() error { return b.streams(ctx, os.Stdout, mebibytes) },
		func() error { return b.memory(ctx, os.Stdout) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("%w; containerd's log ends:\n%s", err, d.Log(20))
		}
	}
	return nil
}

type bench struct {
	d    *daemon.Daemon
	runs int // so far, for ids
}

// run is a `ctr run` with these flags and the rest, up to its start.
func (b *bench) run(ctx context.Context, runtime string, args ...string) *exec.Cmd {
	return b.d.Ctr(ctx, append([]string{"run", "--runtime", runtime, "--fifo-dir", b.d.FIFODir()}, args...)...)
}

// id is a container id that was not used before.
func (b *bench) id() string {
	b.runs++
	return b.d.ID(fmt.Sprintf("b%d", b.runs))
}

// machine prints what the numbers depend on.
func (b *bench) machine(ctx context.Context, w io.Writer, g daemon.Generation) error {
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		return fmt.Errorf("ask for the kernel: %w", err)
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "- %s\n- host kernel %s, load before the run %s\n", cpu(), unix.ByteSliceToString(host.Release[:]), strings.Fields(string(load))[0])
	for _, args := range [][]string{{g.Containerd, "--version"}, {"runc", "--version"}, {"qemu-system-x86_64", "--version"}} {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		fmt.Fprintf(w, "- %s\n", first)
	}
	fmt.Fprintf(w, "- %s\n\n", time.Now().UTC().Format(time.DateOnly))
	return nil
}

// cpu is the number and model of the machine's processors.
func cpu() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err.Error()
	}
	model := "unknown CPU"
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			model = strings.TrimSpace(value)
		}
	}
	return fmt.Sprintf("%d × %s", strings.Count(string(info), "processor\t"), model)
}
