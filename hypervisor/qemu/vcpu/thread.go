package vcpu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hostThreads returns the threads of a process as this namespace numbers them, by
// their ids in the innermost one that they are in.
func hostThreads(pid int) (map[int]int, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	threads := map[int]int{}
	for _, task := range tasks {
		status, err := os.ReadFile(dir + "/" + task.Name() + "/status")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		host, inner, err := namespacePIDs(string(status))
		if err != nil {
			return nil, fmt.Errorf("thread %s: %w", task.Name(), err)
		}
		threads[inner] = host
	}
	return threads, nil
}

// namespacePIDs reads the line NSpid of a status in /proc (proc_pid_status(5)): the
// thread's id in the namespace of the reader, then in each inner one.
func namespacePIDs(status string) (outer, inner int, err error) {
	for line := range strings.Lines(status) {
		list, ok := strings.CutPrefix(line, "NSpid:")
		if !ok {
			continue
		}
		ids := strings.Fields(list)
		if len(ids) == 0 {
			break
		}
		outer, err := strconv.Atoi(ids[0])
		if err != nil {
			return 0, 0, err
		}
		inner, err := strconv.Atoi(ids[len(ids)-1])
		return outer, inner, err
	}
	return 0, 0, errors.New("its status has no NSpid")
}
