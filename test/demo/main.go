// Command demo runs one container in a micro-VM, by a private containerd: what
// `make demo` ends with.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

// script is what the container runs.
const script = `echo "hello from $(hostname), kernel $(uname -r)"; echo "up for $(cut -d' ' -f1 /proc/uptime) s, with"; grep MemTotal /proc/meminfo`

func main() {
	daemon.Supervise()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := demo(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

func demo(ctx context.Context) (err error) {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	generation, err := daemon.Lookup(root, "1.6")
	if err != nil {
		return err
	}
	d, err := daemon.Start(ctx, daemon.Config{Generation: generation, Root: root})
	if err != nil {
		return err
	}
	defer func() {
		leftovers, closeErr := d.Close(context.WithoutCancel(ctx))
		if err == nil {
			err = closeErr
		}
		if err == nil && len(leftovers) > 0 {
			err = fmt.Errorf("the container left behind: %s", strings.Join(leftovers, "; "))
		}
	}()
	return run(ctx, d)
}

// run prints all there is to see of one container.
func run(ctx context.Context, d *daemon.Daemon) error {
	args := []string{"run", "--rm", "--runtime", "io.containerd.husk.v2", "--fifo-dir", d.FIFODir(), images.Busybox, "demo", "sh", "-c", script}
	fmt.Printf("\n$ ctr %s\n", strings.Join(args[:len(args)-1], " ")+" '"+script+"'")
	began := time.Now()
	cmd := d.Ctr(ctx, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	took := time.Since(began)
	fmt.Printf("%s\n", out)
	if err != nil {
		return fmt.Errorf("run the container: %w; containerd's log ends:\n%s", err, d.Log(30))
	}
	host, err := exec.Command("uname", "-r").Output()
	if err != nil {
		return fmt.Errorf("ask for the host's kernel: %w", err)
	}
	guest := guestKernel.FindSubmatch(out)
	if guest == nil {
		return fmt.Errorf("the container did not tell its kernel")
	}
	fmt.Printf("host's kernel   %s", host)
	fmt.Printf("guest's kernel  %s\n", guest[1])
	log := d.Log(1000)
	if reason := fallback.FindString(log); reason != "" {
		fmt.Printf("accelerator     %s\n", reason)
	}
	lines := startLines.FindAllString(log, -1)
	if len(lines) != 2 {
		return fmt.Errorf("the shim did not log the start; containerd's log ends:\n%s", d.Log(30))
	}
	fmt.Println("the start")
	for _, phase := range duration.FindAllStringSubmatch(strings.Join(lines, " "), -1) {
		if phase[1] != "took" { // the sum of those before it
			fmt.Printf("  %-13s %8s\n", phase[1], phase[2])
		}
	}
	fmt.Printf("ctr run --rm    %8s\n", took.Round(time.Millisecond))
	return nil
}

var (
	guestKernel = regexp.MustCompile(`kernel (\S+)`)
	// fallback is what the shim says where KVM cannot be used.
	fallback   = regexp.MustCompile(`[^"]*TCG[^"\n]*`)
	startLines = regexp.MustCompile(`.*(sandbox|container) started.*`)
	duration   = regexp.MustCompile(`(\w+)=([0-9][0-9a-zµ.]*s)\b`)
)
