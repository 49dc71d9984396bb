package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

// neighbours are two pods of one handler.
type neighbours struct {
	pods   []*node.Pod
	client string // a container of the first
	server string // the address of the second, where peer serves

	rates []float64         // MiB/s, one for each stream
	trips [][]time.Duration // one list for each series
	execs []time.Duration
	warm  bool // whether transfers count
}

// neighbours prints how fast two pods talk, and how long an exec takes in one.
func (n *bench) neighbours(ctx context.Context, w io.Writer, p plan) error {
	all := map[string]*neighbours{}
	err := n.InTurn(ctx, 1, func(handler string) (err error) {
		all[handler], err = n.meet(ctx, handler)
		return err
	})
	if err == nil {
		// One that does not count: under TCG it has the guest's code translated.
		err = n.InTurn(ctx, 1+p.transfers, func(handler string) error { return n.transfer(ctx, all[handler], p) })
	}
	if err != nil {
		return fmt.Errorf("measure the network: %w", err)
	}
	n.printNetwork(w, all, p)
	if err := n.InTurn(ctx, p.execs, func(handler string) error {
		began := time.Now()
		err := n.Exec(ctx, all[handler].client, nil, "true")
		all[handler].execs = append(all[handler].execs, time.Since(began))
		return err
	}); err != nil {
		return fmt.Errorf("measure execs: %w", err)
	}
	fmt.Fprintf(w, "### Exec in a pod: ExecSync of `true`, %d interleaved pairs\n\n", p.execs)
	n.Header(w)
	for _, q := range quantiles {
		n.Row(w, q.name, func(handler string) string {
			return fmt.Sprintf("%d ms", sample.Quantile(all[handler].execs, q.q).Milliseconds())
		})
	}
	n.Row(w, "least to most", func(handler string) string {
		execs := all[handler].execs
		return fmt.Sprintf("%d to %d ms", slices.Min(execs).Milliseconds(), slices.Max(execs).Milliseconds())
	})
	fmt.Fprintln(w)
	var errs []error
	for _, pair := range all {
		for _, p := range pair.pods {
			errs = append(errs, p.Remove(ctx))
		}
	}
	return errors.Join(errs...)
}

// quantiles are those of latencies.
var quantiles = []struct {
	name string
	q    float64
}{{"p50", 0.5}, {"p99", 0.99}}

// meet runs two pods.
func (n *bench) meet(ctx context.Context, handler string) (*neighbours, error) {
	pair := &neighbours{}
	for _, command := range [][]string{idle, {"peer", "serve"}} {
		p, err := n.Run(ctx, handler)
		if err != nil {
			return nil, err
		}
		pair.pods = append(pair.pods, p)
		id, err := p.Start(ctx, "peer", command...)
		if err != nil {
			return nil, err
		}
		if pair.client == "" {
			pair.client = id
		} else if pair.server, err = p.Address(ctx); err != nil {
			return nil, err
		}
	}
	return pair, nil
}

// transfer streams once and makes one series of round trips.
func (n *bench) transfer(ctx context.Context, pair *neighbours, p plan) error {
	var stream struct {
		Bytes uint64
		Took  time.Duration
	}
	if err := n.Exec(ctx, pair.client, &stream, "peer", "stream", pair.server, fmt.Sprintf("%ds", p.seconds)); err != nil {
		return err
	}
	var echo struct{ Times []time.Duration }
	if err := n.Exec(ctx, pair.client, &echo, "peer", "echo", pair.server, strconv.Itoa(p.trips)); err != nil {
		return err
	}
	if stream.Took <= 0 || len(echo.Times) != p.trips {
		return fmt.Errorf("a stream took %v, and there were %d round trips of %d", stream.Took, len(echo.Times), p.trips)
	}
	if pair.warm {
		pair.rates = append(pair.rates, float64(stream.Bytes)/(1<<20)/stream.Took.Seconds())
		pair.trips = append(pair.trips, echo.Times)
	}
	pair.warm = true
	return nil
}

func (n *bench) printNetwork(w io.Writer, all map[string]*neighbours, p plan) {
	fmt.Fprintf(w, "### From pod to pod over TCP: medians of %d interleaved pairs after one to warm up (least to most)\n\n", p.transfers)
	n.Header(w)
	n.Row(w, fmt.Sprintf("one stream of %d s", p.seconds), func(handler string) string { return sample.Rates(all[handler].rates) })
	for _, q := range quantiles {
		n.Row(w, fmt.Sprintf("round trip of a byte, %d in series: %s", p.trips, q.name), func(handler string) string {
			var list []time.Duration
			for _, series := range all[handler].trips {
				list = append(list, sample.Quantile(series, q.q))
			}
			return sample.Microseconds(list)
		})
	}
	fmt.Fprintln(w)
}
