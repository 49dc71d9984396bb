package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Process is one of the machine's.
type Process struct {
	PID  int
	PPID int
	// Name is the command's, at most 15 bytes; Args its command line.
	Name string
	Args []string
}

// String is the process on one line, for a report.
func (p Process) String() string {
	return fmt.Sprintf("pid %d %s: %.200s", p.PID, p.Name, strings.Join(p.Args, " "))
}

// Processes lists what runs; zombies are left out.
func Processes() ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var list []Process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if p, ok := readProcess(pid); ok {
			list = append(list, p)
		}
	}
	return list, nil
}

// readProcess is false where the process has ended.
func readProcess(pid int) (Process, bool) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return Process{}, false
	}
	// pid (comm) state ppid ...: the name may hold spaces and brackets.
	open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
	if open < 0 || end < open {
		return Process{}, false
	}
	fields := strings.Fields(string(stat[end+1:]))
	if len(fields) < 2 || fields[0] == "Z" || fields[0] == "X" {
		return Process{}, false
	}
	ppid, err := strconv.Atoi(fields[1])
	if err != nil {
		return Process{}, false
	}
	args, _ := os.ReadFile(filepath.Join(dir, "cmdline")) // empty for a kernel thread, gone with the process
	return Process{
		PID:  pid,
		PPID: ppid,
		Name: string(stat[open+1 : end]),
		Args: strings.Split(strings.TrimRight(string(args), "\x00"), "\x00"),
	}, true
}

// Descendants lists all processes below pid, parents before children.
func Descendants(pid int) ([]Process, error) {
	all, err := Processes()
	if err != nil {
		return nil, err
	}
	children := map[int][]Process{}
	for _, p := range all {
		children[p.PPID] = append(children[p.PPID], p)
	}
	list := children[pid]
	for i := 0; i < len(list); i++ {
		list = append(list, children[list[i].PID]...)
	}
	return list, nil
}

// Trees parts processes, parents before children, into trees, whose first is the
// one whose parent is not among them.
func Trees(processes []Process) [][]Process {
	var trees [][]Process
	tree := map[int]int{} // by pid
	for _, p := range processes {
		i, ok := tree[p.PPID]
		if !ok {
			i = len(trees)
			trees = append(trees, nil)
		}
		tree[p.PID] = i
		trees[i] = append(trees[i], p)
	}
	return trees
}

// WaitExit waits until the process has ended, at most until ctx does. A pid
// that is not there has ended.
func WaitExit(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	timeout := -1
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(0, int(time.Until(deadline).Milliseconds()))
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", pid, err)
		case n == 0:
			return fmt.Errorf("wait for process %d: %w", pid, context.DeadlineExceeded)
		default:
			return nil
		}
	}
}
