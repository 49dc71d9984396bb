// Command files measures what containers do with files and with forwarded sockets,
// in Husk beside runc by one private containerd in one run, and prints the tables of
// docs/numbers.md. With -matrix it compares Husk's ways to run virtiofsd instead.
// Run it in the repository's root, on a machine that does nothing else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
	"github.com/husk-containers/husk/test/images"
)

const (
	husk = "io.containerd.husk.v2"
	runc = "io.containerd.runc.v2"
)

// image is busybox with the programs fio and load in it.
const image = "example.test/files:latest"

// A plan is how much is measured.
type plan struct {
	rounds   int
	smalls   int // files of the load small
	clones   int // files of the load clone
	packages int // packages of the load install
	mib      int // size of fio's file
	seconds  int // of a random load of fio's, and of a stream over a socket
	only     *regexp.Regexp
}

func main() {
	daemon.Supervise()
	generation := flag.String("containerd", "1.6", "`generation` of containerd: 1.6 or 2.4")
	scratch := flag.String("scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
	programs := flag.String("programs", "build/bin", "`directory` of the containers' programs, fio and bench-load")
	matrix := flag.Bool("matrix", false, "compare the ways to run virtiofsd")
	only := flag.String("only", "", "measure the loads alone whose name matches this regular `expression`")
	var p plan
	flag.IntVar(&p.rounds, "rounds", 3, "number of interleaved runs of each load")
	flag.IntVar(&p.smalls, "smalls", 10_000, "number of small files")
	flag.IntVar(&p.clones, "clones", 1_000, "number of files in the tree of a clone")
	flag.IntVar(&p.packages, "packages", 250, "number of packages that are installed, of 20 files each")
	flag.IntVar(&p.mib, "mib", 256, "size of the file of sequential and random loads, in MiB")
	flag.IntVar(&p.seconds, "seconds", 1, "length of a random load and of a stream, in seconds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	var err error
	if p.only, err = regexp.Compile(*only); err == nil {
		err = measure(ctx, *generation, *scratch, *programs, *matrix, p)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, generation, scratch, programs string, matrix bool, p plan) (err error) {
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
	b := &bench{d: d, shared: filepath.Join(d.Dir, "shared")}
	defer func() {
		err = errors.Join(err, b.end(context.WithoutCancel(ctx)))
		leftovers, closeErr := d.Close(context.WithoutCancel(ctx))
		if len(leftovers) > 0 {
			closeErr = errors.Join(closeErr, fmt.Errorf("left behind: %s", strings.Join(leftovers, "; ")))
		}
		err = errors.Join(err, closeErr)
	}()
	if err := b.prepare(ctx, programs); err != nil {
		return err
	}
	steps := []func(context.Context, io.Writer, plan) error{b.files, b.sockets}
	if matrix {
		steps = []func(context.Context, io.Writer, plan) error{b.matrix}
	} else {
		fmt.Print("## Files and sockets\n\n")
	}
	for _, step := range steps {
		if err := step(ctx, os.Stdout, p); err != nil {
			return fmt.Errorf("%w; containerd's log ends:\n%s", err, d.Log(20))
		}
	}
	return nil
}

// prepare imports the image and makes the directory that containers share with the
// host.
func (b *bench) prepare(ctx context.Context, programs string) error {
	if err := os.Mkdir(b.shared, 0o755); err != nil {
		return fmt.Errorf("make the shared directory: %w", err)
	}
	files, err := images.BusyboxRoot()
	if err != nil {
		return err
	}
	for name, program := range map[string]string{"bin/fio": "fio", "bin/load": "bench-load"} {
		data, err := os.ReadFile(filepath.Join(programs, program))
		if err != nil {
			return fmt.Errorf("read the containers' program: %w; make bench builds it", err)
		}
		files = append(files, images.File{Name: name, Data: data, Mode: 0o755})
	}
	archive := filepath.Join(b.d.Dir, "files.tar")
	f, err := os.Create(archive)
	if err != nil {
		return fmt.Errorf("create image archive: %w", err)
	}
	defer os.Remove(archive)
	if err := errors.Join(images.WriteArchive(f, image, files), f.Close()); err != nil {
		return fmt.Errorf("write image archive: %w", err)
	}
	if out, err := b.d.Ctr(ctx, "image", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("import image: %w: %s", err, out)
	}
	return nil
}
