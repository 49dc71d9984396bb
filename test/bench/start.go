package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/images"
)

// A start is the times of one `ctr run --rm`.
type start struct {
	firstOutput, returned time.Duration
}

// starts runs both runtimes in turn, so that what else the machine does meets
// both.
func (b *bench) starts(ctx context.Context, w io.Writer, pairs int) error {
	results := map[string][]start{}
	for range pairs {
		for _, runtime := range []string{runc, husk} {
			s, err := b.start(ctx, runtime)
			if err != nil {
				return fmt.Errorf("start with %s: %w", runtime, err)
			}
			results[runtime] = append(results[runtime], s)
		}
	}
	column := func(runtime string, f func(start) time.Duration) []time.Duration {
		var list []time.Duration
		for _, s := range results[runtime] {
			list = append(list, f(s))
		}
		return list
	}
	fmt.Fprintf(w, "### Start: `ctr run --rm`, medians of %d interleaved pairs (least to most)\n\n", pairs)
	fmt.Fprint(w, "| | husk | runc |\n|---|---|---|\n")
	for _, row := range []struct {
		name string
		of   func(start) time.Duration
	}{
		{"to the first output", func(s start) time.Duration { return s.firstOutput }},
		{"to `ctr` returning", func(s start) time.Duration { return s.returned }},
	} {
		fmt.Fprintf(w, "| %s | %s | %s |\n", row.name, sample.Milliseconds(column(husk, row.of)), sample.Milliseconds(column(runc, row.of)))
	}
	return b.phases(w, column(husk, func(s start) time.Duration { return s.firstOutput }))
}

func (b *bench) start(ctx context.Context, runtime string) (start, error) {
	cmd := b.run(ctx, runtime, "--rm", images.Busybox, b.id(), "echo", "x")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return start{}, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return start{}, err
	}
	var s start
	_, readErr := io.ReadFull(stdout, make([]byte, len("x\n")))
	s.firstOutput = time.Since(began)
	err = cmd.Wait()
	s.returned = time.Since(began)
	if err == nil {
		err = readErr
	}
	if err != nil {
		return start{}, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return s, nil
}

var phase = regexp.MustCompile(`(\w+)=([0-9][0-9a-zµ.]*s)\b`)

// phases prints the medians of what the shim logged of each start. What is left
// of the time to the first output is containerd's and the shim's start.
func (b *bench) phases(w io.Writer, firstOutput []time.Duration) error {
	var names []string
	times := map[string][]time.Duration{}
	for line := range strings.Lines(b.d.Log(1 << 20)) {
		if !strings.Contains(line, "sandbox started") && !strings.Contains(line, "container started") {
			continue
		}
		for _, match := range phase.FindAllStringSubmatch(line, -1) {
			took, err := time.ParseDuration(match[2])
			if err != nil {
				return fmt.Errorf("read phase %s: %w", match[0], err)
			}
			if !slices.Contains(names, match[1]) {
				names = append(names, match[1])
			}
			times[match[1]] = append(times[match[1]], took)
		}
	}
	for _, name := range []string{"took", "create", "start"} {
		if len(times[name]) != len(firstOutput) {
			return fmt.Errorf("the shims logged %d starts of %d", len(times[name]), len(firstOutput))
		}
	}
	fmt.Fprint(w, "\n### Husk's start by phase\n\n| phase | median |\n|---|---|\n")
	for _, name := range names {
		if name != "took" {
			fmt.Fprintf(w, "| %s | %s |\n", name, sample.Milliseconds(times[name]))
		}
	}
	rest := make([]time.Duration, len(firstOutput))
	for i := range rest {
		rest[i] = firstOutput[i] - times["took"][i] - times["create"][i] - times["start"][i]
	}
	fmt.Fprintf(w, "| the rest: ctr, containerd, the shim's `start`, streams | %s |\n", sample.Milliseconds(rest))
	fmt.Fprintf(w, "| **to the first output** | %s |\n\n", sample.Milliseconds(firstOutput))
	return nil
}
