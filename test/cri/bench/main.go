// Command bench measures pods of Husk beside pods of runc, by one private
// containerd and one CNI network in one run, and prints the tables of
// docs/numbers.md. Run it in the repository's root, on a machine that does
// nothing else.
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

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// runc is the handler that Husk's is compared with.
const runc = "runc"

// A plan is how much is measured.
type plan struct {
	pairs        int // pods of each handler that are started
	execs        int // in a pod of each
	transfers    int // streams and series of round trips between pods of each
	trips        int // round trips in a series
	seconds      int // of a stream
	memoryRounds int
}

func main() {
	daemon.Supervise()
	generation := flag.String("containerd", "1.6", "`generation` of containerd: 1.6 or 2.4")
	scratch := flag.String("scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
	handler := flag.String("handler", "husk", "CRI `runtime handler` under test: husk, or husk-shim of containerd 2.4")
	peer := flag.String("peer", "build/bin/bench-peer", "`program` that the pods talk with, built from test/bench/peer without cgo")
	var p plan
	flag.IntVar(&p.pairs, "pairs", 10, "number of pods of each handler that are started")
	flag.IntVar(&p.execs, "execs", 100, "number of execs in a pod of each")
	flag.IntVar(&p.transfers, "transfers", 5, "number of streams, and of series of round trips, between pods of each")
	flag.IntVar(&p.trips, "trips", 1000, "number of round trips in a series")
	flag.IntVar(&p.seconds, "seconds", 3, "length of a stream, in seconds")
	flag.IntVar(&p.memoryRounds, "memory-rounds", 2, "number of times that idle pods are looked at")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := measure(ctx, *generation, *scratch, *handler, *peer, p); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, generation, scratch, handler, peer string, p plan) (err error) {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	g, err := daemon.Lookup(root, generation)
	if err != nil {
		return err
	}
	d, err := daemon.Start(ctx, daemon.Config{Generation: g, Root: root, Scratch: scratch, CRI: &daemon.CRI{Networks: []string{network}}})
	if err != nil {
		return err
	}
	n := &node{d: d, handlers: []string{handler, runc}}
	defer func() { err = errors.Join(err, n.close(context.WithoutCancel(ctx))) }()
	if err := n.connect(ctx, peer); err != nil {
		return err
	}
	fmt.Printf("## Pods\n\nBy CRI, handlers %s, one network: the CNI plugin bridge, MTU %d.\n\n", strings.Join(n.handlers, " and "), mtu)
	for _, step := range []func(context.Context, io.Writer, plan) error{n.starts, n.neighbours, n.memory} {
		if err := step(ctx, os.Stdout, p); err != nil {
			return fmt.Errorf("%w; containerd's log ends:\n%s", err, d.Log(20))
		}
	}
	return nil
}

// header begins a table that has a column for each handler.
func (n *node) header(w io.Writer) {
	fmt.Fprintf(w, "| | %s |\n|---|---|---|\n", strings.Join(n.handlers, " | "))
}

// row prints a cell for each handler.
func (n *node) row(w io.Writer, name string, cell func(handler string) string) {
	fmt.Fprintf(w, "| %s |", name)
	for _, handler := range n.handlers {
		fmt.Fprintf(w, " %s |", cell(handler))
	}
	fmt.Fprintln(w)
}

// inTurn calls f for each handler, and that so often, so that what else the
// machine does meets both. It ends when ctx does.
func (n *node) inTurn(ctx context.Context, times int, f func(handler string) error) error {
	for range times {
		for _, handler := range n.handlers {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(handler); err != nil {
				return fmt.Errorf("handler %s: %w", handler, err)
			}
		}
	}
	return nil
}
