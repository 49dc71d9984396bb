// Command bench measures pods of Husk beside pods of runc, by one private
// containerd and one CNI network in one run, and prints the tables of
// docs/numbers.md. Run it in the repository's root, on a machine that does
// nothing else.
package main

import (
	"context"
	"flag"
	"io"

	"github.com/husk-containers/husk/test/cri/bench/node"
	"github.com/husk-containers/husk/test/daemon"
)

// A plan is how much is measured.
type plan struct {
	pairs        int // pods of each handler that are started
	execs        int // in a pod of each
	transfers    int // streams and series of round trips between pods of each
	trips        int // round trips in a series
	seconds      int // of a stream
	memoryRounds int
}

// A bench measures on a node.
type bench struct{ *node.Node }

func main() {
	daemon.Supervise()
	var o node.Options
	o.Register(flag.CommandLine)
	flag.StringVar(&o.Peer, "peer", "build/bin/bench-peer", "`program` that the pods talk with, built from test/bench/peer without cgo")
	var p plan
	flag.IntVar(&p.pairs, "pairs", 10, "number of pods of each handler that are started")
	flag.IntVar(&p.execs, "execs", 100, "number of execs in a pod of each")
	flag.IntVar(&p.transfers, "transfers", 5, "number of streams, and of series of round trips, between pods of each")
	flag.IntVar(&p.trips, "trips", 1000, "number of round trips in a series")
	flag.IntVar(&p.seconds, "seconds", 3, "length of a stream, in seconds")
	flag.IntVar(&p.memoryRounds, "memory-rounds", 2, "number of times that idle pods are looked at")
	flag.Parse()
	node.Main(o, "Pods", func(ctx context.Context, n *node.Node, w io.Writer) error {
		b := bench{n}
		for _, step := range []func(context.Context, io.Writer, plan) error{b.starts, b.neighbours, b.memory} {
			if err := step(ctx, w, p); err != nil {
				return err
			}
		}
		return nil
	})
}
