package daemon

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

const smaps = `55d0c0a00000-55d0c0a51000 r--p 00000000 fe:01 1318                       /usr/bin/qemu-system-x86_64
Size:                324 kB
Pss:                 100 kB
Pss_Dirty:             7 kB
VmFlags: rd mr mw me
7f0000000000-7f0010000000 rw-s 00000000 00:01 2059                       /memfd:memory-backend-memfd (deleted)
Size:             262144 kB
Pss:               90000 kB
Pss_Dirty:         90000 kB
VmFlags: rd wr sh mr mw me ms
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Pss:                   4 kB
7f0030000000-7f0030001000 rw-s 00000000 00:01 2059                       /memfd:memory-backend-memfd (deleted)
Pss:                   8 kB
`

func TestSumPSS(t *testing.T) {
	for _, c := range []struct {
		prefix string
		want   int
	}{{"", 90112}, {guestRAM, 90008}, {"/usr", 100}, {"[heap]", 0}} {
		got, err := sumPSS(smaps, func(name string) bool { return strings.HasPrefix(name, c.prefix) })
		if err != nil || got != c.want {
			t.Errorf("mappings %q: %d, %v; want %d", c.prefix, got, err, c.want)
		}
	}
	for _, bad := range []string{"0-1 rw-p 0 0:0 0\nPss: 4 MB\n", "0-1 rw-p 0 0:0 0\nPss: x kB\n"} {
		if n, err := sumPSS(bad, func(string) bool { return true }); err == nil {
			t.Errorf("%q: %d, want an error", bad, n)
		}
	}
}

func TestMemoryOfAProcessWithoutAGuest(t *testing.T) {
	m, err := Process{PID: os.Getpid()}.Memory()
	if err != nil {
		t.Fatal(err)
	}
	if m.Own < 1024 || m.Guest != 0 {
		t.Errorf("memory of a test: %+v", m)
	}
	if _, err := (Process{PID: 1 << 30}).Memory(); err == nil {
		t.Error("no error of a process that is not there")
	}
}

func TestTrees(t *testing.T) {
	processes := []Process{{PID: 10, PPID: 1}, {PID: 20, PPID: 1}, {PID: 11, PPID: 10}, {PID: 21, PPID: 20}, {PID: 5, PPID: 11}, {PID: 30, PPID: 2}}
	var got [][]int
	for _, tree := range Trees(processes) {
		var pids []int
		for _, p := range tree {
			pids = append(pids, p.PID)
		}
		got = append(got, pids)
	}
	if want := "[[10 11 5] [20 21] [30]]"; fmt.Sprint(got) != want {
		t.Errorf("trees %v, want %s", got, want)
	}
}
