package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
)

// idle is the command of a container that does nothing.
var idle = []string{"sleep", "100000"}

// A start is the times of one pod's life.
type start struct{ sandbox, first, second, removal time.Duration }

// starts prints how long pods and their containers take to run.
func (n *bench) starts(ctx context.Context, w io.Writer, p plan) error {
	results := map[string][]start{}
	err := n.InTurn(ctx, p.pairs, func(handler string) error {
		s, err := n.start(ctx, handler)
		results[handler] = append(results[handler], s)
		return err
	})
	if err != nil {
		return fmt.Errorf("start a pod: %w", err)
	}
	fmt.Fprintf(w, "### Start of a pod: medians of %d interleaved pairs (least to most)\n\n", p.pairs)
	n.Header(w)
	for _, row := range []struct {
		name string
		of   func(start) time.Duration
	}{
		{"RunPodSandbox", func(s start) time.Duration { return s.sandbox }},
		{"first container: CreateContainer, StartContainer", func(s start) time.Duration { return s.first }},
		{"**from RunPodSandbox to the first container running**", func(s start) time.Duration { return s.sandbox + s.first }},
		{"second container: CreateContainer, StartContainer", func(s start) time.Duration { return s.second }},
		{"StopPodSandbox, RemovePodSandbox, with both containers", func(s start) time.Duration { return s.removal }},
	} {
		n.Row(w, row.name, func(handler string) string {
			var list []time.Duration
			for _, s := range results[handler] {
				list = append(list, row.of(s))
			}
			return sample.Milliseconds(list)
		})
	}
	fmt.Fprintln(w)
	return nil
}

func (n *bench) start(ctx context.Context, handler string) (s start, err error) {
	last := time.Now()
	lap := func() time.Duration {
		began := last
		last = time.Now()
		return last.Sub(began)
	}
	p, err := n.Run(ctx, handler)
	if err != nil {
		return start{}, err
	}
	s.sandbox = lap()
	if _, err := p.Start(ctx, "first", idle...); err != nil {
		return start{}, err
	}
	s.first = lap()
	if _, err := p.Start(ctx, "second", idle...); err != nil {
		return start{}, err
	}
	s.second = lap()
	if err := p.Remove(ctx); err != nil {
		return start{}, err
	}
	s.removal = lap()
	return s, nil
}
