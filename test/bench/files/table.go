package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/bench/sample"
)

// A table is what was measured of several columns, run by run.
type table struct {
	columns []string
	rows    []string
	units   map[string]unit
	values  map[string]map[string][]float64 // by row and column
}

func newTable(columns ...string) *table {
	return &table{columns: columns, units: map[string]unit{}, values: map[string]map[string][]float64{}}
}

func (t *table) add(column string, figures []figure) {
	for _, f := range figures {
		if t.values[f.name] == nil {
			t.rows = append(t.rows, f.name)
			t.units[f.name] = f.unit
			t.values[f.name] = map[string][]float64{}
		}
		t.values[f.name][column] = append(t.values[f.name][column], f.value)
	}
}

// compare runs each load in each container in turn, and that so often, so that what
// else the machine does meets all. No container is the first in every round.
func compare(ctx context.Context, containers []*container, list []load, rounds int, dir string) (*table, error) {
	t := newTable()
	for _, c := range containers {
		t.columns = append(t.columns, c.name)
	}
	for round := range rounds {
		for _, l := range list {
			for i := range containers {
				c := containers[(round+i)%len(containers)]
				// What the one wrote is not the next one's to wait for.
				unix.Sync()
				figures, err := l.run(ctx, c, c.in(dir))
				if err != nil {
					return nil, err
				}
				t.add(c.name, figures)
			}
		}
		for _, c := range containers {
			if _, err := c.output(ctx, "rm", "-f", c.in(dir)+"/fio"); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}

// cell is the median of a row's column, with the least and the most.
func (t *table) cell(row, column string) string {
	values := t.values[row][column]
	switch {
	case len(values) == 0:
		return "-"
	case t.units[row] == mebibytesPerSecond:
		return sample.Rates(values)
	case t.units[row] == operationsPerSecond:
		return sample.Frequencies(values)
	}
	times := make([]time.Duration, len(values))
	for i, v := range values {
		times[i] = time.Duration(v * float64(time.Second))
	}
	if slices.Max(times) < 10*time.Millisecond {
		return sample.Microseconds(times)
	}
	return sample.Milliseconds(times)
}

// factor is how much longer one column takes than another: the median of the runs.
func (t *table) factor(row, column, than string) string {
	a, b := t.values[row][column], t.values[row][than]
	list := make([]float64, min(len(a), len(b)))
	for i := range list {
		list[i] = t.units[row].slowness(a[i], b[i])
	}
	if len(list) == 0 {
		return "-"
	}
	return sample.Factors(list)
}

// printPair prints the two columns, and how much longer the first takes.
func (t *table) printPair(w io.Writer) {
	one, other := t.columns[0], t.columns[1]
	fmt.Fprintf(w, "| | %s | %s | %s takes |\n|---|---|---|---|\n", one, other, one)
	for _, row := range t.rows {
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", row, t.cell(row, one), t.cell(row, other), t.factor(row, one, other))
	}
	fmt.Fprintln(w)
}

// printBase prints the first column, and of the others how much longer they take.
func (t *table) printBase(w io.Writer) {
	fmt.Fprintf(w, "| | %s |\n|---%s|\n", strings.Join(t.columns, " | "), strings.Repeat("|---", len(t.columns)))
	for _, row := range t.rows {
		fmt.Fprintf(w, "| %s | %s |", row, t.cell(row, t.columns[0]))
		for _, column := range t.columns[1:] {
			fmt.Fprintf(w, " %s |", t.factor(row, column, t.columns[0]))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
}

// files prints what both runtimes do with files, on a bind and on the root.
func (b *bench) files(ctx context.Context, w io.Writer, p plan) error {
	list := loads(p)
	if len(list) == 0 {
		return nil
	}
	var both []*container
	for _, r := range []struct{ name, runtime string }{{"husk", husk}, {"runc", runc}} {
		c, err := b.start(ctx, r.name, r.runtime)
		if err != nil {
			return err
		}
		both = append(both, c)
	}
	short := slices.DeleteFunc(slices.Clone(list), func(l load) bool { return l.long })
	for _, place := range []struct {
		name, dir string
		list      []load
	}{
		{"on a directory of the host, bound", sharedIn, list},
		{"on the root file system", rootIn, short},
	} {
		if len(place.list) == 0 {
			continue
		}
		t, err := compare(ctx, both, place.list, p.rounds, place.dir)
		if err != nil {
			return fmt.Errorf("measure files %s: %w", place.name, err)
		}
		fmt.Fprintf(w, "### Files %s: medians of %d interleaved pairs (least to most)\n\n", place.name, p.rounds)
		t.printPair(w)
	}
	return b.end(ctx)
}
