package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
)

// A job is one load of fio's.
type job struct {
	name   string
	rw     string // fio's name of it
	direct bool
	sync   bool // each write is followed by fsync
}

// depth is how many requests at once a job has that bypasses the page cache.
const depth = 16

// jobs begin with that which writes the file. Where a kernel has the page cache,
// requests at once are none, whatever fio asks for.
var jobs = []job{
	{name: "sequential write", rw: "write"},
	{name: "sequential read", rw: "read"},
	{name: "random read", rw: "randread"},
	{name: "random write", rw: "randwrite"},
	{name: "random write, fsync after each", rw: "randwrite", sync: true},
	{name: "sequential write, O_DIRECT", rw: "write", direct: true},
	{name: "sequential read, O_DIRECT", rw: "read", direct: true},
	{name: "random read, O_DIRECT", rw: "randread", direct: true},
	{name: "random write, O_DIRECT", rw: "randwrite", direct: true},
}

func (j job) random() bool { return j.rw == "randread" || j.rw == "randwrite" }

func (j job) load(p plan) load {
	name := j.name
	if j.direct {
		name += fmt.Sprintf(", %d at once", depth)
	}
	return load{
		name:    name,
		command: func(dir string) []string { return j.command(dir, p) },
		figures: func(output []byte) ([]figure, error) { return j.figures(name, output) },
	}
}

// command leaves the page cache as it is: a file that the host has in memory is
// what both runtimes have to read.
func (j job) command(dir string, p plan) []string {
	args := []string{
		"fio", "--name=job", "--output-format=json", "--thread", "--invalidate=0", "--fallocate=none",
		"--filename=" + filepath.Join(dir, "fio"), fmt.Sprintf("--size=%dm", p.mib), "--rw=" + j.rw,
	}
	if j.random() {
		args = append(args, "--bs=4k", "--time_based", fmt.Sprintf("--runtime=%d", p.seconds))
	} else {
		args = append(args, "--bs=1m")
	}
	if j.sync {
		args = append(args, "--fsync=1")
	}
	if j.direct {
		return append(args, "--direct=1", "--ioengine=libaio", fmt.Sprintf("--iodepth=%d", depth))
	}
	return append(args, "--ioengine=psync")
}

// figures are MiB/s of a sequential job, and operations per second of a random one.
func (j job) figures(name string, output []byte) ([]figure, error) {
	type direction struct {
		Bytes int64   `json:"bw_bytes"`
		IOPS  float64 `json:"iops"`
	}
	var result struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	if err := json.Unmarshal(output, &result); err != nil {
		return nil, fmt.Errorf("read what fio said: %w: %.200q", err, output)
	}
	if len(result.Jobs) != 1 || result.Jobs[0].Error != 0 {
		return nil, fmt.Errorf("fio did not run its job: %.200q", output)
	}
	d := result.Jobs[0].Read
	if j.rw == "write" || j.rw == "randwrite" {
		d = result.Jobs[0].Write
	}
	if j.random() {
		return []figure{{name, operationsPerSecond, d.IOPS}}, nil
	}
	return []figure{{name, mebibytesPerSecond, float64(d.Bytes) / (1 << 20)}}, nil
}
