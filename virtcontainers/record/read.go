package record

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// A Process is one on record. With its start time, in clock ticks since the host's boot,
// it is told from a later one of the same pid.
type Process struct {
	Name      string
	PID       int
	StartTime uint64
}

// Processes reads which are on the record in dir: the sandbox's bundle or, once that was
// left, its own directory. It is fs.ErrNotExist where no record is there.
func Processes(dir string) ([]Process, error) {
	raw, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		return nil, err
	}
	var h held
	if err := json.Unmarshal(raw, &h); err != nil {
		return nil, fmt.Errorf("read the record of what the sandbox holds: %w", err)
	}
	var processes []Process
	for _, p := range h.Processes {
		processes = append(processes, Process(p))
	}
	return processes, nil
}
