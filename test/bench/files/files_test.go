package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestEachJobIsOneFioUnderstands(t *testing.T) {
	p := plan{mib: 64, seconds: 2}
	for i, want := range []string{
		"--rw=write --bs=1m --ioengine=psync",
		"--rw=read --bs=1m --ioengine=psync",
		"--rw=randread --bs=4k --time_based --runtime=2 --ioengine=psync",
		"--rw=randwrite --bs=4k --time_based --runtime=2 --ioengine=psync",
		"--rw=randwrite --bs=4k --time_based --runtime=2 --fsync=1 --ioengine=psync",
		"--rw=write --bs=1m --direct=1 --ioengine=libaio --iodepth=16",
		"--rw=read --bs=1m --direct=1 --ioengine=libaio --iodepth=16",
		"--rw=randread --bs=4k --time_based --runtime=2 --direct=1 --ioengine=libaio --iodepth=16",
		"--rw=randwrite --bs=4k --time_based --runtime=2 --direct=1 --ioengine=libaio --iodepth=16",
	} {
		got := strings.Join(jobs[i].command("/dir", p), " ")
		if !strings.HasSuffix(got, " --filename=/dir/fio --size=64m "+want) {
			t.Errorf("%s: %s, want it to end with %s", jobs[i].name, got, want)
		}
	}
}

func TestFiguresOfFio(t *testing.T) {
	const said = `{"jobs": [{"jobname": "job", "error": %d,
		"read": {"bw_bytes": 104857600, "iops": 25600.5}, "write": {"bw_bytes": 2097152, "iops": 512}}]}`
	for rw, want := range map[string]figure{
		"read": {"name", mebibytesPerSecond, 100}, "write": {"name", mebibytesPerSecond, 2},
		"randread": {"name", operationsPerSecond, 25600.5}, "randwrite": {"name", operationsPerSecond, 512},
	} {
		got, err := job{rw: rw}.figures("name", fmt.Appendf(nil, said, 0))
		if err != nil || !slices.Equal(got, []figure{want}) {
			t.Errorf("%s: %v, %v; want %v", rw, got, err, want)
		}
	}
	for name, output := range map[string]string{"nothing": "", "no job": `{"jobs": []}`, "an error": fmt.Sprintf(said, 5)} {
		if got, err := (job{rw: "read"}).figures("name", []byte(output)); err == nil {
			t.Errorf("%s: %v and no error", name, got)
		}
	}
}

func TestFiguresOfATree(t *testing.T) {
	l := tree("small", "7 small files", 7)
	if got := l.command("/dir"); !slices.Equal(got, []string{"load", "small", "/dir", "7"}) {
		t.Errorf("command %q", got)
	}
	got, err := l.figures([]byte(`{"Phases": [{"Name": "create", "Took": 1500000000}, {"Name": "stat", "Took": 1000}]}`))
	want := []figure{{"7 small files: create", seconds, 1.5}, {"7 small files: stat", seconds, 1e-6}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

func TestFiguresOfATalk(t *testing.T) {
	l := talk("8 B", 8, 3, 1)
	got, err := l.figures([]byte(`{"Times": [3000, 1000, 2000], "Stream": {"Bytes": 2097152, "Took": 500000000}}`))
	want := []figure{
		{"8 B there and back: p50", seconds, 2e-6},
		{"8 B there and back: p99", seconds, 3e-6},
		{"stream of 1 s by writes of 8 B", mebibytesPerSecond, 4},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := l.figures([]byte(`{"Times": [1], "Stream": {"Bytes": 8, "Took": 1}}`)); err == nil {
		t.Error("a message is enough for three")
	}
}

func TestTables(t *testing.T) {
	table := newTable("husk", "runc")
	for i := range 3 {
		table.add("husk", []figure{{"a", seconds, 0.3}, {"b", mebibytesPerSecond, 10}, {"c", operationsPerSecond, 5}})
		table.add("runc", []figure{{"a", seconds, 0.1}, {"b", mebibytesPerSecond, float64(20 + i)}})
	}
	var pair, base strings.Builder
	table.printPair(&pair)
	if want := `| | husk | runc | husk takes |
|---|---|---|---|
| a | 300 ms (300 to 300) | 100 ms (100 to 100) | 3.0 × (3.0 to 3.0) |
| b | 10 MiB/s (10 to 10) | 21 MiB/s (20 to 22) | 2.1 × (2.0 to 2.2) |
| c | 5 /s (5 to 5) | - | - |

`; pair.String() != want {
		t.Errorf("pair:\n%swant:\n%s", pair.String(), want)
	}
	table.printBase(&base)
	if want := "| a | 300 ms (300 to 300) | 0.33 × (0.33 to 0.33) |\n"; !strings.Contains(base.String(), want) {
		t.Errorf("base:\n%swant in it:\n%s", base.String(), want)
	}
}

func TestOnlyNarrowsTheLoads(t *testing.T) {
	p := plan{smalls: 1, clones: 1, packages: 1, only: regexp.MustCompile("random|install")}
	var names []string
	for _, l := range loads(p) {
		names = append(names, l.name)
	}
	if want := []string{
		"random read", "random write", "random write, fsync after each",
		"random read, O_DIRECT, 16 at once", "random write, O_DIRECT, 16 at once", "install of 20 files",
	}; !slices.Equal(names, want) {
		t.Errorf("loads %q, want %q", names, want)
	}
}
