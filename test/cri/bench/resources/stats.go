package main

import (
	"context"
	"fmt"
	"io"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

// statsPods are the numbers of containers of the pods that are asked for statistics.
var statsPods = []int{1, 10}

// statsTarget is for what one call is to cost, under TCG too.
const statsTarget = 20 * time.Millisecond

var statsQuantiles = []struct {
	name string
	q    float64
}{{"least", 0}, {"p50", 0.5}, {"p99", 0.99}, {"most", 1}}

// A statsCall is one that a kubelet makes.
type statsCall struct {
	name string
	do   func(ctx context.Context, p *node.Pod) error
}

var statsCalls = []statsCall{
	{"ContainerStats", func(ctx context.Context, p *node.Pod) error {
		r, err := p.Node.CRI.ContainerStats(ctx, &runtime.ContainerStatsRequest{ContainerId: p.Containers[0]})
		if err == nil && r.GetStats().GetMemory().GetWorkingSetBytes().GetValue() == 0 {
			err = fmt.Errorf("statistics without memory: %v", r)
		}
		return err
	}},
	{"ListContainerStats of the pod", func(ctx context.Context, p *node.Pod) error {
		r, err := p.Node.CRI.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{Filter: &runtime.ContainerStatsFilter{PodSandboxId: p.ID}})
		if err == nil && len(r.Stats) != len(p.Containers) {
			err = fmt.Errorf("statistics of %d containers, want %d", len(r.Stats), len(p.Containers))
		}
		return err
	}},
}

// statistics prints what it costs to ask for them.
func (n *bench) statistics(ctx context.Context, w io.Writer, plan plan) error {
	pods := map[string]map[int]*node.Pod{}
	err := n.InTurn(ctx, 1, func(handler string) (err error) {
		pods[handler] = map[int]*node.Pod{}
		for _, count := range statsPods {
			p, err := n.Run(ctx, handler)
			if err != nil {
				return err
			}
			pods[handler][count] = p
			for i := range count {
				if _, err := p.Start(ctx, fmt.Sprintf("asked%d", i), idle...); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "### Statistics: %d interleaved pairs of each call, of pods of containers that idle\n\n", plan.calls)
	n.Header(w)
	for _, c := range statsCalls {
		for _, count := range statsPods {
			took := map[string][]time.Duration{}
			err := n.InTurn(ctx, plan.calls, func(handler string) error {
				call, cancel := node.Call(ctx)
				defer cancel()
				began := time.Now()
				err := c.do(call, pods[handler][count])
				took[handler] = append(took[handler], time.Since(began))
				return err
			})
			if err != nil {
				return fmt.Errorf("measure %s: %w", c.name, err)
			}
			for _, q := range statsQuantiles {
				n.Row(w, fmt.Sprintf("%s, of %d: %s", c.name, count, q.name), func(handler string) string {
					return fmt.Sprintf("%.1f ms", 1000*sample.Quantile(took[handler], q.q).Seconds())
				})
			}
		}
	}
	fmt.Fprintf(w, "\nTarget for Husk: less than %v at p50.\n\n", statsTarget)
	return nil
}
