package main

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/cri/bench/node"
)

const (
	// reclaimMiB is the limit of the pod that gives memory back.
	reclaimMiB = 1536
	// touchedMiB and cachedMiB are what it takes: of its own, and of the cache of files.
	touchedMiB, cachedMiB = 1024, 256
	// reclaimTarget is how soon reclaimPercent of what was touched is to be back.
	reclaimTarget, reclaimPercent = 10 * time.Second, 90
	// reclaimLimit is for what does not come back.
	reclaimLimit = 6 * reclaimTarget
)

// A reclaimed is what gave memory back, in KiB of the VM's that the host held.
type reclaimed struct {
	before, peak, after []int
	took                []time.Duration
}

// reclaiming prints how memory that a pod has freed goes back to the host.
func (n *bench) reclaiming(ctx context.Context, w io.Writer, plan plan) error {
	p, err := n.RunLimited(ctx, n.Handlers[0], node.Limits(0, reclaimMiB))
	if err == nil {
		_, err = p.Start(ctx, "reclaimed", idle...)
	}
	var freed, cached reclaimed
	for range plan.reclaims {
		if err == nil {
			err = touch(ctx, p, &freed)
		}
		if err == nil {
			err = cache(ctx, p, &cached)
		}
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "### Memory back to the host, of a pod of %d MiB: what the host holds of the VM's, in MiB, medians of %d (least to most)\n\n", reclaimMiB, plan.reclaims)
	fmt.Fprintf(w, "| | %s |\n|---|---|\n", n.Handlers[0])
	for _, row := range [][2]string{
		{fmt.Sprintf("before a container touches %d MiB", touchedMiB), sample.Sizes(freed.before)},
		{"at the peak", sample.Sizes(freed.peak)},
		{fmt.Sprintf("when it has freed it, and %d %% are back", reclaimPercent), sample.Sizes(freed.after)},
		{"from the peak until then", sample.Milliseconds(freed.took)},
		{fmt.Sprintf("before a container writes and reads a file of %d MiB", cachedMiB), sample.Sizes(cached.before)},
		{"after it", sample.Sizes(cached.peak)},
		{"after `husk reclaim`", sample.Sizes(cached.after)},
		{"`husk reclaim`", sample.Milliseconds(cached.took)},
	} {
		fmt.Fprintf(w, "| %s | %s |\n", row[0], row[1])
	}
	fmt.Fprintf(w, "\nTarget: %d %% back in %v.\n\n", reclaimPercent, reclaimTarget)
	return nil
}

// touch has the container take memory and free it, and waits until it is back.
func touch(ctx context.Context, p *node.Pod, r *reclaimed) error {
	before, err := settled(ctx, p)
	if err != nil {
		return err
	}
	peak, peaked := before.Held, time.Now()
	err = during(func() error {
		// Its buffer is what dd takes; it ends as soon as that is full of zeros.
		_, err := p.Node.Output(ctx, p.Containers[0], "dd", "if=/dev/zero", "of=/dev/null", fmt.Sprintf("bs=%dM", touchedMiB), "count=1")
		return err
	}, func() error {
		now, err := p.RAM()
		if now.Held >= peak {
			peak, peaked = now.Held, time.Now()
		}
		return err
	})
	if err != nil {
		return err
	}
	if got := peak - before.Held; got < touchedMiB<<10*reclaimPercent/100 {
		return fmt.Errorf("touch %d MiB: the host came to hold %d KiB more", touchedMiB, got)
	}
	goal := peak - (peak-before.Held)*reclaimPercent/100
	var after node.RAM
	err = eventually(ctx, fmt.Sprintf("%d %% of what was freed is back", reclaimPercent), reclaimLimit, func() (bool, error) {
		after, err = p.RAM()
		return after.Held <= goal, err
	})
	r.before, r.peak, r.after = append(r.before, before.Held), append(r.peak, peak), append(r.after, after.Held)
	r.took = append(r.took, time.Since(peaked))
	return err
}

// cache has the guest cache a file, and give up the cache for husk reclaim. The file is
// removed.
func cache(ctx context.Context, p *node.Pod, r *reclaimed) error {
	before, err := settled(ctx, p)
	if err != nil {
		return err
	}
	script := fmt.Sprintf("dd if=/dev/zero of=/cached bs=1M count=%d 2>/dev/null && cat /cached >/dev/null", cachedMiB)
	if _, err := p.Node.Output(ctx, p.Containers[0], "sh", "-c", script); err != nil {
		return err
	}
	full, err := p.RAM()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := husk(ctx, p, "reclaim"); err != nil {
		return err
	}
	took := time.Since(began)
	after, err := p.RAM()
	if err != nil {
		return err
	}
	r.before, r.peak, r.after = append(r.before, before.Held), append(r.peak, full.Held), append(r.after, after.Held)
	r.took = append(r.took, took)
	if gave := full.Held - after.Held; gave < cachedMiB<<10/2 {
		return fmt.Errorf("husk reclaim with a file of %d MiB in the guest's cache gave %d KiB back", cachedMiB, gave)
	}
	_, err = p.Node.Output(ctx, p.Containers[0], "rm", "/cached")
	return err
}

// settled returns what the host holds of the VM's memory when what was freed a moment
// ago has been given back too.
func settled(ctx context.Context, p *node.Pod) (node.RAM, error) {
	if err := node.Wait(ctx, settleTime); err != nil {
		return node.RAM{}, err
	}
	return p.RAM()
}

// husk runs a command of the operator's tool for a pod.
func husk(ctx context.Context, p *node.Pod, command string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(p.Node.Root, "build", "bin", "husk"), command,
		"-n", "k8s.io", "-config", filepath.Join(p.Node.Daemon.Dir, "configuration.toml"), p.ID)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("husk %s: %w: %s", command, err, out)
	}
	return nil
}
