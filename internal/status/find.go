package status

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/husk-containers/husk/internal/cpulist"
	"github.com/husk-containers/husk/internal/process"
	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
	"github.com/husk-containers/husk/virtcontainers/record"
)

// vcpuName is how QEMU calls its vCPUs' threads where it was told to name threads.
var vcpuName = regexp.MustCompile(`^CPU ([0-9]+)/[A-Z]+$`)

// isMonitor tells QEMU by its name on record or, where nothing is, by its command's. What
// is on record did not choose its name.
func isMonitor(name string, recorded []record.Process) bool {
	if len(recorded) == 0 {
		return strings.HasPrefix(name, "qemu-system")
	}
	return slices.ContainsFunc(recorded, func(r record.Process) bool { return r.Name == "qemu" && r.Name == name })
}

// printable is a command's name without what a terminal would obey: a process can choose
// its own.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, name)
}

// find makes a pod of what its shim answers, or why it does not, of its record and of
// the host's processes.
func find(table process.Table, shim statedir.Shim, processes []process.Process, resp *operatorv1.StatusResponse, silent error) *Pod {
	p := &Pod{Namespace: shim.Namespace, ID: shim.Sandbox, State: "unknown"}
	daemon := daemonOf(processes, shim.Address)
	switch {
	case silent == nil:
		p.answered(resp)
	case daemon == nil && shim.Address != "":
		p.State = "ended"
	}
	if silent != nil {
		p.unknown(fmt.Errorf("%s", silent), "what the shim knows")
	}
	if daemon != nil {
		if age, err := table.Age(*daemon); err == nil {
			seconds := int64(age.Seconds())
			p.AgeSeconds = &seconds
		} else {
			p.unknown(err, "age")
		}
	}
	threads := map[int]int{} // numbers of vCPUs, by thread
	for _, v := range resp.GetVcpus() {
		threads[int(v.GetThread())] = int(v.GetNumber())
	}
	recorded, err := onRecord(table, shim, daemon)
	if err != nil {
		p.unknown(err, "record of the pod's processes")
	}
	for _, one := range members(processes, recorded, daemon) {
		all, err := table.Threads(one.PID)
		if err != nil {
			p.unknown(err, "threads of %s (pid %d)", one.Name, one.PID)
			continue
		}
		monitor := isMonitor(one.Name, recorded)
		if monitor {
			p.monitor = one.PID
		}
		p.add(one.Name, one.PID, all, threads, monitor)
	}
	slices.SortFunc(p.VCPUs, func(a, b VCPU) int { return a.Number - b.Number })
	for _, v := range p.VCPUs {
		p.CPUs = p.CPUs.Union(v.CPUs)
	}
	if len(p.VCPUs) == 0 {
		p.CPUs = p.helpers()
	}
	return p
}

// answered takes over what the shim has told.
func (p *Pod) answered(r *operatorv1.StatusResponse) {
	p.State = word(r.GetState().String())
	p.Accelerator = r.GetAccelerator()
	p.Size, p.Maximum = size(r.GetSize()), size(r.GetMaximum())
	if where := r.GetPlacement(); where.GetCpus() != "" || where.GetMemoryNodes() != "" || where.GetPinned() {
		p.Placement = &Placement{where.GetCpus(), where.GetMemoryNodes(), where.GetPinned()}
	}
	for _, c := range r.GetContainers() {
		p.Containers = append(p.Containers, Container{c.GetId(), word(c.GetState().String())})
	}
	p.Unknown = append(p.Unknown, r.GetUnknown()...)
}

// word is the name of a state: running, for STATE_RUNNING.
func word(state string) string { return strings.ToLower(strings.TrimPrefix(state, "STATE_")) }

func size(s *operatorv1.Size) *Size {
	if s.GetVcpus() == 0 && s.GetMemoryMib() == 0 {
		return nil
	}
	return &Size{int(s.GetVcpus()), int(s.GetMemoryMib())}
}

// daemonOf finds the shim that serves at an address: by its command line, which what it
// is about to exec shares for a moment.
func daemonOf(processes []process.Process, address string) *process.Process {
	var first *process.Process
	for i, p := range processes {
		at := slices.Index(p.Args, "-socket")
		if address == "" || at < 0 || at+1 >= len(p.Args) || strings.TrimPrefix(p.Args[at+1], "unix://") != address {
			continue
		}
		if first == nil || p.Started < first.Started {
			first = &processes[i]
		}
	}
	return first
}

// onRecord reads the sandbox's record: in its own directory, or else in the bundle,
// which is the shim's working directory.
func onRecord(table process.Table, shim statedir.Shim, daemon *process.Process) ([]record.Process, error) {
	recorded, err := record.Processes(shim.Dir)
	if errors.Is(err, fs.ErrNotExist) && daemon != nil {
		recorded, err = record.Processes(table.Dir(daemon.PID, "cwd"))
	}
	return recorded, err
}

// members are the processes on record that still run, by their names there, and then
// what descends from these and from the shim.
func members(processes []process.Process, recorded []record.Process, daemon *process.Process) []process.Process {
	var list []process.Process
	in := map[int]bool{}
	add := func(p process.Process) {
		if !in[p.PID] {
			list, in[p.PID] = append(list, p), true
		}
	}
	for _, r := range recorded {
		i := slices.IndexFunc(processes, func(p process.Process) bool { return p.PID == r.PID && p.Started == r.StartTime })
		if i >= 0 {
			p := processes[i]
			p.Name = r.Name
			add(p)
		}
	}
	if daemon != nil {
		p := *daemon
		p.Name = "shim"
		add(p)
	}
	for i := 0; i < len(list); i++ {
		for _, p := range processes {
			if p.PPID == list[i].PID {
				p.Name = printable(p.Name)
				add(p)
			}
		}
	}
	return list
}

// add adds a process, and apart from it the vCPUs among its threads: by their threads as
// the shim has told them or else, of the monitor, by their names.
func (p *Pod) add(name string, pid int, all []process.Thread, numbers map[int]int, monitor bool) {
	one := Process{Name: name, PID: pid}
	for _, t := range all {
		number, known := numbers[t.ID]
		if match := vcpuName.FindStringSubmatch(t.Name); len(numbers) == 0 && monitor && match != nil {
			var err error
			number, err = strconv.Atoi(match[1])
			known = err == nil
		}
		if known {
			p.VCPUs = append(p.VCPUs, VCPU{Number: number, Thread: t.ID, CPUs: t.CPUs, LastCPU: t.LastCPU})
			continue
		}
		one.LastCPUs = one.LastCPUs.Union(cpulist.Of(t.LastCPU))
		i := slices.IndexFunc(one.Affinities, func(a Affinity) bool { return slices.Equal(a.CPUs, t.CPUs) })
		if i < 0 {
			one.Affinities = append(one.Affinities, Affinity{CPUs: t.CPUs})
			i = len(one.Affinities) - 1
		}
		one.Affinities[i].Threads++
	}
	p.Processes = append(p.Processes, one)
}
