package daemon

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Memory is what a process holds of the host's: its proportional set size, where
// a page counts to each process that maps it by an equal part. In KiB.
type Memory struct {
	// Own is all but Guest.
	Own int
	// Guest is the part of the VM's RAM, which QEMU shares with virtiofsd.
	Guest int
}

// guestRAM is what the kernel calls the memory that QEMU makes for a guest.
const guestRAM = "/memfd:memory-backend-memfd"

// Memory reads what the process holds now.
func (p Process) Memory() (Memory, error) {
	dir := fmt.Sprintf("/proc/%d/", p.PID)
	// The sum of all mappings loses up to 1 KiB at each.
	all, err := readPSS(dir+"smaps_rollup", func(string) bool { return true })
	if err != nil {
		return Memory{}, err
	}
	guest, err := readPSS(dir+"smaps", func(name string) bool { return strings.HasPrefix(name, guestRAM) })
	return Memory{Own: all - guest, Guest: guest}, err
}

func readPSS(path string, of func(name string) bool) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	kib, err := sumPSS(string(data), of)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return kib, nil
}

// sumPSS adds up the Pss, in KiB, of the mappings in a file of smaps' form whose
// name is wanted.
func sumPSS(smaps string, of func(name string) bool) (int, error) {
	sum, wanted := 0, false
	for line := range strings.Lines(smaps) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if !strings.HasSuffix(fields[0], ":") {
			// from-to permissions offset device inode [name]
			name := ""
			if len(fields) > 5 {
				name = strings.Join(fields[5:], " ")
			}
			wanted = of(name)
			continue
		}
		if fields[0] != "Pss:" || !wanted {
			continue
		}
		if len(fields) != 3 || fields[2] != "kB" {
			return 0, fmt.Errorf("unknown line %q", line)
		}
		kib, err := strconv.Atoi(fields[1])
		if err != nil {
			return 0, err
		}
		sum += kib
	}
	return sum, nil
}
