// Command resources measures what pods of Husk hold of their node, and what it costs to
// resize, reclaim, ask and pause them, beside pods of runc, by one private containerd in
// one run. It prints the tables of docs/numbers.md, and the RuntimeClass's overhead. Run
// it in the repository's root, on a machine that does nothing else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"time"

	"github.com/husk-containers/husk/test/cri/bench/node"
	"github.com/husk-containers/husk/test/daemon"
)

// A plan is how much is measured.
type plan struct {
	rounds   int // pods of each size whose memory is looked at
	resizes  int // series of them
	reclaims int
	calls    int // for statistics, of each kind
	pauses   int
}

// A bench measures on a node.
type bench struct{ *node.Node }

func main() {
	daemon.Supervise()
	var o node.Options
	o.Register(flag.CommandLine)
	only := regexp.MustCompile("")
	flag.Func("only", "measure the parts alone whose name matches this regular `expression`: overhead, resize, reclaim, statistics, pause", func(text string) (err error) {
		only, err = regexp.Compile(text)
		return err
	})
	var p plan
	flag.IntVar(&p.rounds, "rounds", 2, "number of pods of each size whose memory is looked at")
	flag.IntVar(&p.resizes, "resizes", 3, "number of series of resizes")
	flag.IntVar(&p.reclaims, "reclaims", 3, "number of times that memory is given back, each way")
	flag.IntVar(&p.calls, "calls", 100, "number of calls for statistics, of each kind")
	flag.IntVar(&p.pauses, "pauses", 10, "number of pauses")
	flag.Parse()
	node.Main(o, "Resources", func(ctx context.Context, n *node.Node, w io.Writer) error {
		b := bench{n}
		var errs []error
		for _, part := range []struct {
			name string
			do   func(context.Context, io.Writer, plan) error
		}{
			{"overhead", b.overhead},
			{"resize", b.resizing},
			{"reclaim", b.reclaiming},
			{"statistics", b.statistics},
			{"pause", b.pausing},
		} {
			if !only.MatchString(part.name) || ctx.Err() != nil {
				continue
			}
			// What a part began with has to be gone before the next, come of it what may.
			if err := errors.Join(part.do(ctx, w, p), n.RemoveAll(context.WithoutCancel(ctx))); err != nil {
				errs = append(errs, fmt.Errorf("measure %s: %w", part.name, err))
			}
		}
		return errors.Join(append(errs, ctx.Err())...)
	})
}

// settleTime is for which pods are left alone before they are looked at.
const settleTime = 5 * time.Second

// idle is the command of a container that does nothing.
var idle = []string{"sleep", "100000"}

// sampleInterval is how often is read what the kernel tells nobody of.
const sampleInterval = 20 * time.Millisecond

// during has look called again and again while work is done.
func during(work, look func() error) error {
	done := make(chan error, 1)
	go func() { done <- work() }() // is waited for below
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-tick.C:
			if err := look(); err != nil {
				<-done
				return err
			}
		}
	}
}

// eventually has look called until it is true, at most for so long.
func eventually(ctx context.Context, what string, limit time.Duration, look func() (bool, error)) error {
	end := time.Now().Add(limit)
	for {
		if done, err := look(); done || err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not within %v", what, limit)
		}
		if err := node.Wait(ctx, sampleInterval); err != nil {
			return err
		}
	}
}
