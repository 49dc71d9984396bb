package status

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/husk-containers/husk/internal/cpulist"
	"github.com/husk-containers/husk/internal/process"
	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

// questions is how many shims are asked at a time.
const questions = 16

// A Host is where sandboxes are looked for.
type Host struct {
	// StateDir is the configuration's runtime.state_dir.
	StateDir string
	// Proc and Sys are where the file systems of those names are mounted.
	Proc, Sys string
	// Ask asks a shim for the state of its sandbox.
	Ask func(ctx context.Context, shim statedir.Shim) (*operatorv1.StatusResponse, error)
}

// Pods looks at every sandbox of a namespace; empty: of all.
func (h Host) Pods(ctx context.Context, namespace string) ([]*Pod, error) {
	return h.look(ctx, func(s statedir.Shim) bool { return namespace == "" || s.Namespace == namespace })
}

// Pod looks at the one sandbox whose id is id or begins with it (see statedir.Find).
func (h Host) Pod(ctx context.Context, namespace, id string) (*Pod, error) {
	shim, err := statedir.Find(h.StateDir, namespace, id)
	if err != nil {
		return nil, err
	}
	pods, err := h.look(ctx, func(s statedir.Shim) bool { return s.Dir == shim.Dir })
	if err != nil {
		return nil, err
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("pod %s/%s ends just now", shim.Namespace, shim.Sandbox)
	}
	return pods[0], nil
}

// look looks at those of the sandboxes that are wanted. Of the others it finds what they
// share with these.
func (h Host) look(ctx context.Context, wanted func(statedir.Shim) bool) ([]*Pod, error) {
	shims, err := statedir.All(h.StateDir)
	if err != nil {
		return nil, err
	}
	table := process.Table(h.Proc)
	processes, err := table.All()
	if err != nil {
		return nil, err
	}
	online, err := h.online()
	if err != nil {
		return nil, err
	}
	pods := make([]*Pod, len(shims))
	var work sync.WaitGroup
	slots := make(chan struct{}, questions)
	for i, shim := range shims {
		work.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			resp, err := h.Ask(ctx, shim)
			pods[i] = find(table, shim, processes, resp, err)
		})
	}
	work.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	shown := []*Pod{} // an empty list for JSON, where there is none
	for i, p := range pods {
		if wanted(shims[i]) {
			p.Shares, p.Warnings = relate(p, pods, online)
			h.measure(p)
			shown = append(shown, p)
		}
	}
	return shown, nil
}

// online are the host's CPUs that work.
func (h Host) online() (cpulist.Set, error) {
	raw, err := os.ReadFile(filepath.Join(h.Sys, "devices/system/cpu/online"))
	if err != nil {
		return nil, fmt.Errorf("find the host's CPUs: %w", err)
	}
	return cpulist.Parse(string(raw))
}

// measure adds what takes the kernel some work: memory, and what follows from where the
// pod is.
func (h Host) measure(p *Pod) {
	table := process.Table(h.Proc)
	var err error
	for i := range p.Processes {
		one := &p.Processes[i]
		if one.Memory, err = table.Memory(one.PID); err != nil {
			p.unknown(err, "memory of %s (pid %d)", one.Name, one.PID)
		}
		p.Memory = p.Memory.Plus(one.Memory)
		if one.NodeKiB, err = table.Nodes(one.PID); err != nil {
			p.unknown(err, "NUMA nodes of the memory of %s (pid %d)", one.Name, one.PID)
		}
	}
	if p.Nodes, err = h.nodes(p.CPUs); err != nil {
		p.unknown(err, "NUMA nodes")
	}
	if len(p.Processes) == 0 {
		return
	}
	leader := p.Processes[max(0, slices.IndexFunc(p.Processes, func(one Process) bool { return one.PID == p.monitor }))]
	if p.Cgroups, err = table.Cgroups(leader.PID); err != nil {
		p.unknown(err, "cgroup of %s (pid %d)", leader.Name, leader.PID)
	}
	if p.Pressure, err = h.pressure(p.Cgroups); err != nil {
		p.unknown(err, "pressure")
	}
}

// unknown notes what could not be found out. What has ended meanwhile, or what the
// kernel was built without, is not missed.
func (p *Pod) unknown(err error, format string, args ...any) {
	if !errors.Is(err, fs.ErrNotExist) {
		p.Unknown = append(p.Unknown, fmt.Sprintf(format, args...)+": "+strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

// nodes are the NUMA nodes of CPUs.
func (h Host) nodes(cpus cpulist.Set) (cpulist.Set, error) {
	var nodes cpulist.Set
	lists, err := filepath.Glob(filepath.Join(h.Sys, "devices/system/node/node[0-9]*/cpulist"))
	if err != nil {
		return nil, err
	}
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		if err != nil {
			return nil, err
		}
		set, err := cpulist.Parse(string(raw))
		if err != nil {
			return nil, err
		}
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(list)), "node"))
		if err == nil && len(set.And(cpus)) > 0 {
			nodes = nodes.Union(cpulist.Of(number))
		}
	}
	return nodes, nil
}
