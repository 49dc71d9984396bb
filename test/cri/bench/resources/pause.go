package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

// busy is the command of a container that always has something to do.
var busy = []string{"sh", "-c", "while :; do :; done"}

// pauseTime is for which a pod's CPU time is watched.
const pauseTime = 5 * time.Second

// paused is what was found of one handler.
type paused struct {
	pod           *node.Pod
	task          string // the one to pause: a pod's of Husk, the container's of runc
	pause, resume []time.Duration
	used          map[string]time.Duration // CPU time in pauseTime, by what the pod does
}

// What a pod does while its CPU time is watched.
const (
	whileIdle   = "idle"
	whileBusy   = "with a busy container"
	whilePaused = "the same, paused"
)

// pausing prints what a pause takes, and what a paused pod does.
func (n *bench) pausing(ctx context.Context, w io.Writer, plan plan) error {
	all := map[string]*paused{}
	err := n.InTurn(ctx, 1, func(handler string) error {
		p, err := n.Run(ctx, handler)
		if err != nil {
			return err
		}
		all[handler] = &paused{pod: p, task: p.ID, used: map[string]time.Duration{}}
		_, err = p.Start(ctx, "idle", idle...)
		return err
	})
	if err == nil {
		err = node.Wait(ctx, settleTime)
	}
	if err == nil {
		err = n.watch(ctx, all, whileIdle)
	}
	if err == nil {
		err = n.InTurn(ctx, 1, func(handler string) error {
			id, err := all[handler].pod.Start(ctx, "busy", busy...)
			if !all[handler].pod.VM {
				all[handler].task = id
			}
			return err
		})
	}
	if err == nil {
		err = n.watch(ctx, all, whileBusy)
	}
	if err == nil {
		err = n.InTurn(ctx, plan.pauses, func(handler string) error { return all[handler].cycle(ctx) })
	}
	if err == nil {
		err = n.InTurn(ctx, 1, func(handler string) error { return all[handler].do(ctx, "pause") })
	}
	if err == nil {
		err = n.watch(ctx, all, whilePaused)
	}
	if err == nil {
		err = n.InTurn(ctx, 1, func(handler string) error { return all[handler].do(ctx, "resume") })
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "### Pause of a pod, of its busy container under runc: medians of %d interleaved pairs (least to most)\n\n", plan.pauses)
	n.Header(w)
	n.Row(w, "`ctr task pause`", func(handler string) string { return sample.Milliseconds(all[handler].pause) })
	n.Row(w, "`ctr task resume`", func(handler string) string { return sample.Milliseconds(all[handler].resume) })
	for _, what := range []string{whileIdle, whileBusy, whilePaused} {
		n.Row(w, fmt.Sprintf("CPU of the pod's processes in %v, once: %s", pauseTime, what), func(handler string) string {
			return fmt.Sprintf("%d ms", all[handler].used[what].Milliseconds())
		})
	}
	fmt.Fprintln(w)
	return nil
}

// watch adds to all what their pods use of the CPUs, side by side.
func (n *bench) watch(ctx context.Context, all map[string]*paused, what string) error {
	read := func(sign time.Duration) error {
		return n.InTurn(ctx, 1, func(handler string) error {
			used, err := all[handler].pod.CPUTime()
			all[handler].used[what] += sign * used
			return err
		})
	}
	if err := read(-1); err != nil {
		return err
	}
	if err := node.Wait(ctx, pauseTime); err != nil {
		return err
	}
	return read(1)
}

// cycle pauses and resumes.
func (p *paused) cycle(ctx context.Context) error {
	began := time.Now()
	if err := p.do(ctx, "pause"); err != nil {
		return err
	}
	p.pause = append(p.pause, time.Since(began))
	began = time.Now()
	if err := p.do(ctx, "resume"); err != nil {
		return err
	}
	p.resume = append(p.resume, time.Since(began))
	return nil
}

// do has ctr do it to the task.
func (p *paused) do(ctx context.Context, command string) error {
	ctx, cancel := node.Call(ctx)
	defer cancel()
	if out, err := p.pod.Node.Daemon.Ctr(ctx, "task", command, p.task).CombinedOutput(); err != nil {
		return fmt.Errorf("ctr task %s: %w: %s", command, err, out)
	}
	return nil
}
