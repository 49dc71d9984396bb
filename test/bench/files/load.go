package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"
)

// A unit is what a figure counts.
type unit int

// The units.
const (
	seconds unit = iota
	mebibytesPerSecond
	operationsPerSecond
)

// A figure is one number of a run.
type figure struct {
	name  string
	unit  unit
	value float64
}

// slowness is how much longer a takes than b.
func (u unit) slowness(a, b float64) float64 {
	if u == seconds {
		return a / b
	}
	return b / a
}

// A load is one command in a container, and what its output says.
type load struct {
	name    string
	long    bool // for minutes: then it is run in one place alone
	command func(dir string) []string
	figures func(output []byte) ([]figure, error)
}

// loads are all, in the order in which they run: fio's first writes the file that
// the others of its work on.
func loads(p plan) []load {
	var list []load
	add := func(l load) {
		if p.only.MatchString(l.name) {
			list = append(list, l)
		}
	}
	for _, j := range jobs {
		add(j.load(p))
	}
	add(tree("clone", fmt.Sprintf("clone of %d files", p.clones), p.clones))
	for _, l := range []load{
		tree("small", fmt.Sprintf("%d small files", p.smalls), p.smalls),
		tree("install", fmt.Sprintf("install of %d files", 20*p.packages), p.packages),
	} {
		l.long = true
		add(l)
	}
	return list
}

// tree is a load of many files.
func tree(kind, name string, n int) load {
	return load{
		name:    name,
		command: func(dir string) []string { return []string{"load", kind, dir, strconv.Itoa(n)} },
		figures: func(output []byte) ([]figure, error) {
			var result struct {
				Phases []struct {
					Name string
					Took time.Duration
				}
			}
			if err := json.Unmarshal(output, &result); err != nil {
				return nil, fmt.Errorf("read what load said: %w", err)
			}
			var list []figure
			for _, p := range result.Phases {
				list = append(list, figure{name + ": " + p.Name, seconds, p.Took.Seconds()})
			}
			return list, nil
		},
	}
}

// run is one run of the load in dir.
func (l load) run(ctx context.Context, c *container, dir string) ([]figure, error) {
	out, err := c.output(ctx, l.command(dir)...)
	if err != nil {
		return nil, err
	}
	list, err := l.figures(out)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w", l.name, c.name, err)
	}
	for _, f := range list {
		if f.value <= 0 {
			return nil, fmt.Errorf("%s with %s: %s is %v", l.name, c.name, f.name, f.value)
		}
	}
	return list, nil
}
