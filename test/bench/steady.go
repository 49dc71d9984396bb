package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/test/bench/sample"
	"github.com/husk-containers/husk/test/images"
)

// What Husk is to reach on any machine.
const (
	targetAgentMiB     = 16
	targetMiBPerSecond = 50
)

// detached starts a container that sleeps, and returns its id and an end to it.
func (b *bench) detached(ctx context.Context, runtime string) (id string, end func() error, err error) {
	id = b.id()
	cmd := b.run(ctx, runtime, "-d", "--null-io", images.Busybox, id, "sleep", "100000")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", nil, fmt.Errorf("start %s: %w: %s", id, err, out)
	}
	return id, func() error {
		for _, args := range [][]string{{"task", "rm", "--force", id}, {"container", "rm", id}} {
			if out, err := b.d.Ctr(ctx, args...).CombinedOutput(); err != nil {
				return fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
			}
		}
		return nil
	}, nil
}

// execs prints how long `ctr task exec` of an empty program takes.
func (b *bench) execs(ctx context.Context, w io.Writer, n int) error {
	fmt.Fprintf(w, "### Exec: `ctr task exec ID true`, %d times\n\n| | p50 | p99 |\n|---|---|---|\n", n)
	for _, runtime := range []string{husk, runc} {
		id, end, err := b.detached(ctx, runtime)
		if err != nil {
			return err
		}
		var times []time.Duration
		for i := range n {
			began := time.Now()
			cmd := b.d.Ctr(ctx, "task", "exec", "--fifo-dir", b.d.FIFODir(), "--exec-id", fmt.Sprintf("e%d", i), id, "true")
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("exec with %s: %w: %s", runtime, err, out)
			}
			times = append(times, time.Since(began))
		}
		if err := end(); err != nil {
			return err
		}
		fmt.Fprintf(w, "| %s | %d ms | %d ms |\n", runtime, sample.Quantile(times, 0.5).Milliseconds(), sample.Quantile(times, 0.99).Milliseconds())
	}
	fmt.Fprintln(w)
	return nil
}

// streamRuns is how often each direction is measured.
const streamRuns = 5

// streams prints how fast bytes pass out of and into a container.
func (b *bench) streams(ctx context.Context, w io.Writer, mebibytes int) error {
	fmt.Fprintf(w, "### Standard streams: %d MiB through `ctr run`, medians of %d\n\n| | out | in |\n|---|---|---|\n", mebibytes, streamRuns)
	size := mebibytes << 20
	for _, runtime := range []string{husk, runc} {
		var out, in []time.Duration
		for range streamRuns {
			took, err := b.transfer(ctx, runtime, nil, size, fmt.Sprintf("echo ready; dd if=/dev/zero bs=64k count=%d 2>/dev/null | cat", size>>16))
			if err != nil {
				return err
			}
			out = append(out, took)
			// Counted by whole records: to count bytes costs more than to bring them.
			took, err = b.transfer(ctx, runtime, make([]byte, size), 0,
				"echo ready; dd of=/dev/null bs=1M iflag=fullblock 2>&1 | sed -n 's/+0 records in//p' >&2")
			if err != nil {
				return err
			}
			in = append(in, took)
		}
		rate := func(times []time.Duration) float64 {
			return float64(mebibytes) / sample.Quantile(times, 0.5).Seconds()
		}
		fmt.Fprintf(w, "| %s | %.0f MiB/s | %.0f MiB/s |\n", runtime, rate(out), rate(in))
	}
	fmt.Fprintf(w, "\nTarget for Husk: at least %d MiB/s, under TCG too.\n\n", targetMiBPerSecond)
	return nil
}

// transfer times a container from its line "ready" to the last byte of output.
func (b *bench) transfer(ctx context.Context, runtime string, input []byte, want int, script string) (time.Duration, error) {
	cmd := b.run(ctx, runtime, "--rm", images.Busybox, b.id(), "sh", "-c", script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(stdout, make([]byte, len("ready\n"))); err != nil {
		return 0, fmt.Errorf("wait for the container: %w: %s", err, stderr.String())
	}
	began := time.Now()
	_, writeErr := stdin.Write(input)
	stdin.Close() // tells only what Write told
	n, readErr := io.Copy(io.Discard, stdout)
	took := time.Since(began)
	if err := cmd.Wait(); err != nil || writeErr != nil || readErr != nil {
		return 0, fmt.Errorf("stream through %s: %w, write %v, read %v: %s", runtime, err, writeErr, readErr, stderr.String())
	}
	if got := strings.TrimSpace(stderr.String()); n != int64(want) || input != nil && got != strconv.Itoa(len(input)>>20) {
		return 0, fmt.Errorf("stream through %s: %d bytes out, %q MiB in; want %d and %d", runtime, n, got, want, len(input)>>20)
	}
	return took, nil
}

// settleTime is for which an idle pod is left alone before it is looked at.
const settleTime = 5 * time.Second

// memory prints what an idle pod costs: on the host by process, and of its own
// memory the agent.
func (b *bench) memory(ctx context.Context, w io.Writer) error {
	fmt.Fprint(w, "### Memory of an idle pod: PSS on the host\n\n| | process | MiB |\n|---|---|---|\n")
	for _, runtime := range []string{husk, runc} {
		_, end, err := b.detached(ctx, runtime)
		if err != nil {
			return err
		}
		select {
		case <-time.After(settleTime):
		case <-ctx.Done():
			return ctx.Err()
		}
		processes, err := b.d.Processes()
		if err != nil {
			return err
		}
		total := 0
		for _, p := range processes {
			m, err := p.Memory()
			if err != nil {
				return err
			}
			kib := m.Own + m.Guest
			total += kib
			fmt.Fprintf(w, "| %s | %s | %.1f |\n", runtime, p.Name, float64(kib)/1024)
		}
		fmt.Fprintf(w, "| %s | **all** | %.1f |\n", runtime, float64(total)/1024)
		if err := end(); err != nil {
			return err
		}
	}
	kib, err := b.agentRSS(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\nAgent in the guest: RSS %.1f MiB; target: at most %d.\n", float64(kib)/1024, targetAgentMiB)
	return nil
}

// agentRSS is in KiB. A container without a pid namespace of its own sees the
// guest's first process.
func (b *bench) agentRSS(ctx context.Context) (int, error) {
	out, err := b.d.Ctr(ctx, "oci", "spec").Output()
	if err != nil {
		return 0, fmt.Errorf("ask for the default spec: %w", err)
	}
	var s specs.Spec
	if err := json.Unmarshal(out, &s); err != nil {
		return 0, fmt.Errorf("decode the default spec: %w", err)
	}
	files, err := images.BusyboxRoot()
	if err != nil {
		return 0, err
	}
	root := filepath.Join(b.d.Dir, "rootfs")
	if err := os.Mkdir(root, 0o755); err != nil {
		return 0, err
	}
	if err := images.Unpack(root, files); err != nil {
		return 0, err
	}
	id := b.id()
	s.Root = &specs.Root{Path: root}
	s.Process.Env, s.Process.Args = []string{"PATH=/bin"}, []string{"cat", "/proc/1/comm", "/proc/1/status"}
	s.Linux.CgroupsPath = filepath.Join("/", b.d.Token, id)
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.PIDNamespace })
	data, err := json.Marshal(s)
	if err != nil {
		return 0, err
	}
	config := filepath.Join(b.d.Dir, "config.json")
	if err := os.WriteFile(config, data, 0o600); err != nil {
		return 0, err
	}
	cmd := b.run(ctx, husk, "--rm", "--config", config, id)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	status, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("look at the agent: %w: %s", err, stderr.String())
	}
	path := filepath.Join(b.d.Dir, "status")
	if err := os.WriteFile(path, status, 0o600); err != nil {
		return 0, err
	}
	return field(path, "VmRSS")
}

// field reads a number of KiB from a file of /proc's form.
func field(path, name string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	match := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+) kB$`).FindSubmatch(data)
	if match == nil {
		return 0, fmt.Errorf("read %s: no %s", path, name)
	}
	return strconv.Atoi(string(match[1]))
}
