package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/daemon"
)

// virtiofsdC is the one of QEMU 7.2, whose options without a key the matrix tries.
const virtiofsdC = "/usr/lib/qemu/virtiofsd"

// A variant is a way to run virtiofsd.
type variant struct {
	name    string
	cache   string
	threads int
	option  string // of virtiofsdC's -o, or empty
}

// variants begin with the one that others are compared with.
var variants = []variant{
	{name: "auto", cache: "auto"},
	{name: "never", cache: "never"},
	{name: "always", cache: "always"},
	{name: "auto, 1 thread", cache: "auto", threads: 1},
	{name: "auto, 4 threads", cache: "auto", threads: 4},
	{name: "auto, 16 threads", cache: "auto", threads: 16},
	{name: "auto, 64 threads", cache: "auto", threads: 64},
	{name: "auto, writeback", cache: "auto", option: "writeback"},
	{name: "auto, no_allow_direct_io", cache: "auto", option: "no_allow_direct_io"},
	{name: "auto, no_readdirplus", cache: "auto", option: "no_readdirplus"},
}

// matrix prints what each variant costs, and what each shows of a change.
func (b *bench) matrix(ctx context.Context, w io.Writer, p plan) error {
	var containers, single []*container
	for _, v := range variants {
		c, err := b.startVariant(ctx, v)
		if err != nil {
			return fmt.Errorf("virtiofsd with %s: %w", v.name, err)
		}
		containers = append(containers, c)
		if v.threads == 0 { // how many there are changes nothing of what is seen
			single = append(single, c)
		}
	}
	fmt.Fprintf(w, "### When a change is seen, at the latest of %d\n\n", runsOfChange)
	if err := b.changes(ctx, w, single); err != nil {
		return err
	}
	c, err := b.start(ctx, "runc", runc)
	if err != nil {
		return err
	}
	t, err := compare(ctx, append(containers, c), loads(p), p.rounds, sharedIn)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "### Ways to run virtiofsd: medians of %d interleaved runs (least to most); of all but the first how much longer they take\n\n", p.rounds)
	t.printBase(w)
	return b.end(ctx)
}

func (b *bench) startVariant(ctx context.Context, v variant) (*container, error) {
	keys := map[string]any{"virtiofsd_cache": v.cache, "virtiofsd_threads": v.threads}
	if v.option != "" {
		path := filepath.Join(b.d.Dir, "virtiofsd-"+v.option)
		program := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" -o %s\n", virtiofsdC, v.option)
		if err := os.WriteFile(path, []byte(program), 0o755); err != nil {
			return nil, fmt.Errorf("write a script: %w", err)
		}
		keys["virtiofsd"] = path
	}
	if err := b.d.Configure(daemon.Settings{"hypervisor": keys}); err != nil {
		return nil, err
	}
	return b.start(ctx, v.name, husk)
}

// A change is made by one side, and seen by the other.
type change struct {
	name string
	// see returns how long it took; false means longer than anybody waited.
	see func(c *container, ctx context.Context) (time.Duration, bool, error)
}

var changes = []change{
	{"the host's new file, looked up before", func(c *container, ctx context.Context) (time.Duration, bool, error) {
		return c.watch(ctx, "appear", func(name string) error { return os.WriteFile(name, nil, 0o644) })
	}},
	{"the host's file renamed over another, opened anew", func(c *container, ctx context.Context) (time.Duration, bool, error) {
		return c.watch(ctx, "reopen", func(name string) error {
			return errors.Join(os.WriteFile(name+"~", []byte("new"), 0o644), os.Rename(name+"~", name))
		})
	}},
	{"the host's append, opened anew", func(c *container, ctx context.Context) (time.Duration, bool, error) {
		return c.watch(ctx, "reopen", appendNew)
	}},
	{"the host's append, in an open file", func(c *container, ctx context.Context) (time.Duration, bool, error) {
		return c.watch(ctx, "follow", appendNew)
	}},
	{"the container's write into an open file", (*container).hold},
}

// runsOfChange is how often each change is made.
const runsOfChange = 3

func (b *bench) changes(ctx context.Context, w io.Writer, containers []*container) error {
	fmt.Fprint(w, "| ")
	for _, c := range changes {
		fmt.Fprintf(w, "| %s ", c.name)
	}
	fmt.Fprintf(w, "| a file maps shared |\n|---|---%s|\n", strings.Repeat("|---", len(changes)))
	for _, c := range containers {
		fmt.Fprintf(w, "| %s |", c.name)
		for _, change := range changes {
			var times []time.Duration
			for range runsOfChange {
				took, seen, err := change.see(c, ctx)
				if err != nil {
					return fmt.Errorf("%s with %s: %w", change.name, c.name, err)
				}
				if seen {
					times = append(times, took)
				}
			}
			if len(times) < runsOfChange {
				fmt.Fprint(w, " not in 4 s |")
			} else {
				fmt.Fprintf(w, " %d ms |", sample.Quantile(times, 1).Milliseconds())
			}
		}
		maps, err := c.mapsShared(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, " %v |\n", maps)
	}
	fmt.Fprintln(w)
	return nil
}

// mapsShared reports whether a file can be mapped such that writes reach it.
func (c *container) mapsShared(ctx context.Context) (bool, error) {
	name := filepath.Join(c.in(sharedIn), "mapped")
	cmd := c.command(ctx, "fio", "--name=job", "--thread", "--ioengine=mmap", "--fallocate=none", "--rw=write", "--size=64k", "--filename="+name)
	out, err := cmd.CombinedOutput()
	if err != nil && !strings.Contains(string(out), "No such device") {
		return false, fmt.Errorf("map a file with %s: %w: %s", c.name, err, out)
	}
	if err := os.RemoveAll(filepath.Join(c.b.shared, c.id, "mapped")); err != nil {
		return false, err
	}
	return err == nil, nil
}

func appendNew(name string) error {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("new")
	return errors.Join(err, f.Close())
}

// watch makes a change on the host when the container has looked at the file.
func (c *container) watch(ctx context.Context, kind string, change func(name string) error) (took time.Duration, seen bool, err error) {
	c.b.ids++
	below := filepath.Join(c.id, fmt.Sprintf("%s-%d", kind, c.b.ids))
	name := filepath.Join(c.b.shared, below)
	if kind != "appear" {
		if err := os.WriteFile(name, []byte("old"), 0o644); err != nil {
			return 0, false, err
		}
	}
	defer os.Remove(name)
	cmd := c.command(ctx, "load", "watch", kind, filepath.Join(sharedIn, below))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, false, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return 0, false, err
	}
	var said []string
	var began time.Time
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		said = append(said, lines.Text())
		if len(said) == 1 {
			err = change(name)
			began = time.Now()
		} else {
			took = time.Since(began)
		}
	}
	if waitErr := cmd.Wait(); err != nil || waitErr != nil {
		return 0, false, fmt.Errorf("watch: %w: %s", errors.Join(err, waitErr), stderr.String())
	}
	seen = slices.Equal(said, []string{"ready", "seen"})
	if !seen && !slices.Equal(said, []string{"ready", "unseen"}) {
		return 0, false, fmt.Errorf("watch said %q", said)
	}
	return took, seen, nil
}

// The host looks that often, and for that long, for what it is not told of.
const (
	interval = 5 * time.Millisecond
	patience = 4 * time.Second
)

// hold has the container write into a file and keep it open.
func (c *container) hold(ctx context.Context) (took time.Duration, seen bool, err error) {
	c.b.ids++
	below := filepath.Join(c.id, fmt.Sprintf("hold-%d", c.b.ids))
	cmd := c.command(ctx, "load", "hold", filepath.Join(sharedIn, below))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, false, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, false, err
	}
	if err := cmd.Start(); err != nil {
		return 0, false, err
	}
	_, err = io.ReadFull(stdout, make([]byte, len("ready\n")))
	began := time.Now()
	for err == nil && !seen && time.Since(began) < patience {
		var data []byte
		data, err = os.ReadFile(filepath.Join(c.b.shared, below))
		seen = string(data) == "new"
		took = time.Since(began)
		if !seen {
			time.Sleep(interval)
		}
	}
	return took, seen, errors.Join(err, stdin.Close(), cmd.Wait())
}
