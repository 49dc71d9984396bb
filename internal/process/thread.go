package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/husk-containers/husk/internal/cpulist"
)

// A Thread is one of a process.
type Thread struct {
	ID   int
	Name string
	// CPUs are those that it may run on, LastCPU the one that it ran on last.
	CPUs    cpulist.Set
	LastCPU int
}

// Threads lists those of a process, in order of their ids.
func (t Table) Threads(pid int) ([]Thread, error) {
	entries, err := os.ReadDir(t.Dir(pid, "task"))
	if err != nil {
		return nil, err
	}
	var threads []Thread
	for _, e := range entries {
		thread, err := t.thread(pid, e.Name())
		switch {
		case errors.Is(err, fs.ErrNotExist): // it has ended
		case err != nil:
			return nil, err
		default:
			threads = append(threads, thread)
		}
	}
	slices.SortFunc(threads, func(a, b Thread) int { return a.ID - b.ID })
	return threads, nil
}

func (t Table) thread(pid int, id string) (Thread, error) {
	name, fields, err := t.stat(strconv.Itoa(pid), "task", id, "stat")
	if err != nil {
		return Thread{}, err
	}
	status, err := t.file(strconv.Itoa(pid), "task", id, "status")
	if err != nil {
		return Thread{}, err
	}
	_, rest, _ := strings.Cut(status, "Cpus_allowed_list:")
	list, _, _ := strings.Cut(rest, "\n")
	cpus, badList := cpulist.Parse(list)
	if badList == nil && len(cpus) == 0 {
		badList = errors.New("no Cpus_allowed_list")
	}
	number, badID := strconv.Atoi(id)
	last, badCPU := strconv.Atoi(fields[statProcessor])
	if err := errors.Join(badList, badID, badCPU); err != nil {
		return Thread{}, fmt.Errorf("parse thread %s of process %d: %w", id, pid, err)
	}
	return Thread{ID: number, Name: name, CPUs: cpus, LastCPU: last}, nil
}
