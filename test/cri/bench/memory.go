package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
	"github.com/husk-containers/husk/test/daemon"
)

// idlePods are the numbers of pods that memory is measured with, ascending.
var idlePods = []int{1, 5, 10}

// settleTime is for which idle pods are left alone before they are looked at.
const settleTime = 5 * time.Second

// memory prints what idle pods cost.
func (n *bench) memory(ctx context.Context, w io.Writer, p plan) error {
	found := map[string]map[int][]node.Footprint{} // by handler and number of pods
	err := n.InTurn(ctx, p.memoryRounds, func(handler string) error {
		if found[handler] == nil {
			found[handler] = map[int][]node.Footprint{}
		}
		return n.fill(ctx, handler, found[handler])
	})
	if err != nil {
		return fmt.Errorf("measure memory: %w", err)
	}
	fmt.Fprintf(w, "### Memory of idle pods: PSS on the host for each pod, in MiB, medians over the pods of %d rounds (least to most)\n\n", p.memoryRounds)
	head, line := "| | |", "|---|---|"
	for _, count := range idlePods {
		head, line = head+fmt.Sprintf(" of %d |", count), line+"---|"
	}
	fmt.Fprintf(w, "%s\n%s\n", head, line)
	for _, handler := range n.Handlers {
		for _, holder := range node.Holders(found[handler]) {
			fmt.Fprintf(w, "| %s | %s |", handler, holder)
			for _, count := range idlePods {
				var list []int
				for _, f := range found[handler][count] {
					list = append(list, f[holder])
				}
				fmt.Fprintf(w, " %s |", sample.Sizes(list))
			}
			fmt.Fprintln(w)
		}
	}
	fmt.Fprintln(w)
	return nil
}

// fill runs pods up to each of idlePods, looks at them, and removes them all.
func (n *bench) fill(ctx context.Context, handler string, found map[int][]node.Footprint) error {
	var pods []*node.Pod
	for _, count := range idlePods {
		for len(pods) < count {
			if err := ctx.Err(); err != nil {
				return err
			}
			p, err := n.Run(ctx, handler)
			if err != nil {
				return err
			}
			pods = append(pods, p)
			if _, err := p.Start(ctx, "idle", idle...); err != nil {
				return err
			}
		}
		if err := node.Wait(ctx, settleTime); err != nil {
			return err
		}
		footprints, err := n.look(count)
		if err != nil {
			return err
		}
		found[count] = append(found[count], footprints...)
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.Remove(ctx))
	}
	return errors.Join(errs...)
}

// look reads the memory of as many pods as there have to be.
func (n *bench) look(count int) ([]node.Footprint, error) {
	processes, err := n.Daemon.Processes()
	if err != nil {
		return nil, err
	}
	var list []node.Footprint
	for _, pod := range daemon.Trees(processes) {
		if pod[0].Name != "containerd-shim" {
			return nil, fmt.Errorf("the process %v belongs to no pod", pod[0])
		}
		f, err := node.Weigh(pod)
		if err != nil {
			return nil, err
		}
		list = append(list, f)
	}
	if len(list) != count {
		return nil, fmt.Errorf("there are %d shims, want one for each of %d pods", len(list), count)
	}
	return list, nil
}
