package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/daemon"
)

// idlePods are the numbers of pods that memory is measured with, ascending.
var idlePods = []int{1, 5, 10}

// settleTime is for which idle pods are left alone before they are looked at.
const settleTime = 5 * time.Second

// What a pod's memory is counted to, beside the names of processes.
const (
	guestRAM   = "guest's RAM"
	everything = "**all**"
)

// A footprint is the KiB of one pod by what holds them.
type footprint map[string]int

// memory prints what idle pods cost.
func (n *node) memory(ctx context.Context, w io.Writer, p plan) error {
	found := map[string]map[int][]footprint{} // by handler and number of pods
	err := n.inTurn(ctx, p.memoryRounds, func(handler string) error {
		if found[handler] == nil {
			found[handler] = map[int][]footprint{}
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
	for _, handler := range n.handlers {
		for _, holder := range holders(found[handler]) {
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
func (n *node) fill(ctx context.Context, handler string, found map[int][]footprint) error {
	var pods []*pod
	for _, count := range idlePods {
		for len(pods) < count {
			if err := ctx.Err(); err != nil {
				return err
			}
			p, err := n.run(ctx, handler)
			if err != nil {
				return err
			}
			pods = append(pods, p)
			if _, err := p.start(ctx, "idle", idle...); err != nil {
				return err
			}
		}
		select {
		case <-time.After(settleTime):
		case <-ctx.Done():
			return ctx.Err()
		}
		footprints, err := n.look(count)
		if err != nil {
			return err
		}
		found[count] = append(found[count], footprints...)
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.remove(ctx))
	}
	return errors.Join(errs...)
}

// look reads the memory of as many pods as there have to be.
func (n *node) look(count int) ([]footprint, error) {
	processes, err := n.d.Processes()
	if err != nil {
		return nil, err
	}
	var list []footprint
	for _, pod := range daemon.Trees(processes) {
		if pod[0].Name != "containerd-shim" {
			return nil, fmt.Errorf("the process %v belongs to no pod", pod[0])
		}
		f := footprint{}
		for _, p := range pod {
			m, err := p.Memory()
			if err != nil {
				return nil, fmt.Errorf("memory of %v: %w", p, err)
			}
			f[p.Name] += m.Own
			f[everything] += m.Own + m.Guest
			if m.Guest > 0 {
				f[guestRAM] += m.Guest
			}
		}
		list = append(list, f)
	}
	if len(list) != count {
		return nil, fmt.Errorf("there are %d shims, want one for each of %d pods", len(list), count)
	}
	return list, nil
}

// holders lists all that the memory of some pod is counted to, the sum last.
func holders(found map[int][]footprint) []string {
	var names []string
	for _, footprints := range found {
		for _, f := range footprints {
			for name := range f {
				if !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if (a == everything) != (b == everything) {
			return map[bool]int{true: 1, false: -1}[a == everything]
		}
		return strings.Compare(a, b)
	})
	return names
}
