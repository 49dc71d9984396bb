package process

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/husk-containers/husk/internal/cpulist"
)

// write makes files below a scratch /proc.
func write(t *testing.T, files map[string]string) Table {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return Table(root)
}

// stat is a line of proc_pid_stat(5).
func stat(pid int, name, state string, ppid, started, cpu int) string {
	return fmt.Sprintf("%d (%s) %s %d%s %d%s %d 0 0\n", pid, name, state, ppid, strings.Repeat(" 0", 17), started, strings.Repeat(" 0", 16), cpu)
}

func TestAll(t *testing.T) {
	table := write(t, map[string]string{
		"10/stat": stat(10, "odd) (name", "S", 1, 700, 3), "10/cmdline": "prog\x00-a\x00b c\x00",
		"9/stat": stat(9, "kthread", "S", 2, 1, 0), "9/cmdline": "",
		"11/stat": stat(11, "dead", "Z", 10, 800, 0), "11/cmdline": "",
		"12/other": "a process that ends just now",
		"uptime":   "17.50 60.00\n",
	})
	want := []Process{
		{PID: 9, PPID: 2, Name: "kthread", Started: 1},
		{PID: 10, PPID: 1, Name: "odd) (name", Args: []string{"prog", "-a", "b c"}, Started: 700},
	}
	got, err := table.All()
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if age, err := table.Age(want[1]); err != nil || age != 10*time.Second {
		t.Errorf("age %v, %v", age, err)
	}
	for _, bad := range []string{"no name", "10 (short) S 1"} {
		if got, err := write(t, map[string]string{"10/stat": bad}).All(); err == nil {
			t.Errorf("%q is read as %+v", bad, got)
		}
	}
}

func TestThreads(t *testing.T) {
	table := write(t, map[string]string{
		"10/task/12/stat": stat(12, "CPU 0/KVM", "S", 1, 700, 3), "10/task/12/status": "Name:\tx\nCpus_allowed:\tc\nCpus_allowed_list:\t2-3\nMems_allowed:\t1\n",
		"10/task/10/stat": stat(10, "qemu", "S", 1, 700, 1), "10/task/10/status": "Name:\tx\nCpus_allowed_list:\t0-1\n",
		"10/task/13/gone": "",
	})
	want := []Thread{{10, "qemu", cpulist.Of(0, 1), 1}, {12, "CPU 0/KVM", cpulist.Of(2, 3), 3}}
	if got, err := table.Threads(10); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	without := write(t, map[string]string{"10/task/10/stat": stat(10, "x", "S", 1, 700, 3), "10/task/10/status": "Name:\tx\n"})
	if _, err := without.Threads(10); err == nil || !strings.Contains(err.Error(), "no Cpus_allowed_list") {
		t.Errorf("without a list: %v", err)
	}
	if _, err := table.Threads(11); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

func TestMemory(t *testing.T) {
	table := write(t, map[string]string{
		"10/smaps_rollup": "55a-7ff ---p 00000000 00:00 0    [rollup]\nRss:   900 kB\nPss:   300 kB\nPss_Dirty:  1 kB\nPss_Anon:  100 kB\nPss_File:   50 kB\nPss_Shmem:  150 kB\n",
		"10/numa_maps": "7f0 default file=/memfd:ram\\040N9=9 dirty=3 N0=2 N1=3 kernelpagesize_kB=2048\n" +
			"7f1 interleave:0-1 anon=1 N1=1 kernelpagesize_kB=4\n7f2 default\n",
		"10/cgroup":       "2:cpu,cpuacct:/pods/a:b\n1:name=systemd:/\n0::/pods\n",
		"11/smaps_rollup": "Pss:  many kB\n", "11/numa_maps": "7f0 default N0=x kernelpagesize_kB=4\n", "11/cgroup": "nothing\n",
	})
	if got, err := table.Memory(10); err != nil || got != (Memory{300, 100, 50, 150}) {
		t.Errorf("memory: %+v, %v", got, err)
	}
	if got, err := table.Nodes(10); err != nil || !maps.Equal(got, map[int]int64{0: 4096, 1: 6148}) {
		t.Errorf("nodes: %v, %v", got, err)
	}
	want := []Cgroup{{"cpu,cpuacct", "/pods/a:b"}, {"name=systemd", "/"}, {"", "/pods"}}
	if got, err := table.Cgroups(10); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("cgroups: %+v, %v", got, err)
	}
	_, memory := table.Memory(11)
	_, nodes := table.Nodes(11)
	_, cgroups := table.Cgroups(11)
	if memory == nil || nodes == nil || cgroups == nil {
		t.Errorf("garbage is read: %v, %v, %v", memory, nodes, cgroups)
	}
}

// What is read of this process by the kernel itself.
func TestTheHostsOwn(t *testing.T) {
	const proc = Table("/proc")
	all, err := proc.All()
	if err != nil {
		t.Fatal(err)
	}
	var self Process
	for _, p := range all {
		if p.PID == os.Getpid() {
			self = p
		}
	}
	if self.PPID != os.Getppid() || !reflect.DeepEqual(self.Args, os.Args) {
		t.Errorf("got %+v", self)
	}
	threads, err := proc.Threads(self.PID)
	if err != nil || threads[0].ID != self.PID || len(threads[0].CPUs) == 0 {
		t.Errorf("threads: %+v, %v", threads, err)
	}
	if m, err := proc.Memory(self.PID); err != nil || m.PSSKiB < 100 {
		t.Errorf("memory: %+v, %v", m, err)
	}
	if age, err := proc.Age(self); err != nil || age > time.Hour {
		t.Errorf("age: %v, %v", age, err)
	}
}

func TestWithChildren(t *testing.T) {
	all := []Process{{PID: 1}, {PID: 9, PPID: 12}, {PID: 10, PPID: 1}, {PID: 11, PPID: 10}, {PID: 12, PPID: 11}, {PID: 13, PPID: 1}}
	given := []int{10, 11}
	if got := WithChildren(all, given); !slices.Equal(got, []int{10, 11, 12, 9}) || !slices.Equal(given, []int{10, 11}) {
		t.Errorf("of %v: %v", given, got)
	}
	if got := WithChildren(all, []int{13, 99}); !slices.Equal(got, []int{13, 99}) {
		t.Errorf("of one without children, and one that has ended: %v", got)
	}
}
