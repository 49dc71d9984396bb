// Package process reads what the kernel tells of the host's processes, of their threads
// and of their memory.
package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ticksPerSecond is what the kernel shows times in, on every architecture that Husk
// runs on: USER_HZ of proc_pid_stat(5).
const ticksPerSecond = 100

// A Table is a file system of processes: /proc, or its like. Where a process has ended,
// errors are fs.ErrNotExist.
type Table string

// A Process is one of the host's. What changes with exec is that of when it was read.
type Process struct {
	PID, PPID int
	// Name is the command's, of at most 15 bytes; Args are empty for a kernel thread.
	Name string
	Args []string
	// Started is in clock ticks since the host's boot: with the pid it names the
	// process for ever.
	Started uint64
}

// All lists the processes that have not ended, in order of their ids.
func (t Table) All() ([]Process, error) {
	entries, err := os.ReadDir(string(t))
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := t.read(pid)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		default:
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b Process) int { return a.PID - b.PID })
	return all, nil
}

// Indexes into stat, after the name. In proc_pid_stat(5) the first of these fields is
// number 3.
const (
	statFirst     = 3
	statState     = 0
	statParent    = 4 - statFirst
	statStarted   = 22 - statFirst
	statProcessor = 39 - statFirst
)

// stat reads a stat file: the name, which may hold anything, and the fields after it.
func (t Table) stat(elements ...string) (name string, fields []string, err error) {
	raw, err := t.file(elements...)
	if err != nil {
		return "", nil, err
	}
	first, last := strings.IndexByte(raw, '('), strings.LastIndexByte(raw, ')')
	if first < 0 || last < first {
		return "", nil, fmt.Errorf("parse %s: no name", filepath.Join(elements...))
	}
	fields = strings.Fields(raw[last+1:])
	if len(fields) <= statProcessor {
		return "", nil, fmt.Errorf("parse %s: %d fields after the name", filepath.Join(elements...), len(fields))
	}
	return raw[first+1 : last], fields, nil
}

func (t Table) read(pid int) (Process, error) {
	id := strconv.Itoa(pid)
	name, fields, err := t.stat(id, "stat")
	if err != nil {
		return Process{}, err
	}
	if fields[statState] == "Z" || fields[statState] == "X" {
		return Process{}, fs.ErrNotExist
	}
	p := Process{PID: pid, Name: name}
	var badStart, badParent error
	p.PPID, badParent = strconv.Atoi(fields[statParent])
	p.Started, badStart = strconv.ParseUint(fields[statStarted], 10, 64)
	if err := errors.Join(badParent, badStart); err != nil {
		return Process{}, fmt.Errorf("parse stat of process %d: %w", pid, err)
	}
	args, err := t.file(id, "cmdline")
	if args = strings.TrimRight(args, "\x00"); args != "" {
		p.Args = strings.Split(args, "\x00")
	}
	return p, err
}

// Dir is where a file of a process is found.
func (t Table) Dir(pid int, name string) string {
	return filepath.Join(string(t), strconv.Itoa(pid), name)
}

// Age is how long ago a process started.
func (t Table) Age(p Process) (time.Duration, error) {
	raw, err := t.file("uptime")
	if err != nil {
		return 0, err
	}
	up, _, _ := strings.Cut(raw, " ")
	seconds, err := strconv.ParseFloat(up, 64)
	if err != nil {
		return 0, fmt.Errorf("parse uptime: %w", err)
	}
	age := time.Duration(seconds*float64(time.Second)) - time.Duration(p.Started)*(time.Second/ticksPerSecond)
	return max(age, 0).Truncate(time.Second), nil
}

// file reads a file below the table; it is not there either where its process has ended
// meanwhile.
func (t Table) file(elements ...string) (string, error) {
	raw, err := os.ReadFile(filepath.Join(append([]string{string(t)}, elements...)...))
	if errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist
	}
	return string(raw), err
}

// WithChildren are processes and those that they have started, and these in turn.
func WithChildren(all []Process, pids []int) []int {
	pids = slices.Clone(pids)
	for i := 0; i < len(pids); i++ {
		for _, p := range all {
			if p.PPID == pids[i] && !slices.Contains(pids, p.PID) {
				pids = append(pids, p.PID)
			}
		}
	}
	return pids
}
