package hotplug

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/husk-containers/husk/agent/cgroup"
)

// machine is one of files: of the CPUs present all but the first can be switched, and
// nothing comes of it.
func machine(t *testing.T, present, online string, memoryKiB int) Machine {
	t.Helper()
	dir := t.TempDir()
	m := Machine{CPUs: filepath.Join(dir, "cpu"), Meminfo: filepath.Join(dir, "meminfo"), Containers: cgroup.Dir(dir)}
	files := map[string]string{
		"cpu/present": present + "\n", "cpu/online": online + "\n",
		"meminfo": fmt.Sprintf("MemTotal:  %d kB\nMemFree: 1 kB\nMemAvailable:   3 kB\n", memoryKiB),
	}
	cpus, err := cgroup.ParseSet(present)
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range cpus[1:] {
		files[fmt.Sprintf("cpu/cpu%d/online", cpu)] = "?"
	}
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func TestOnlineSwitches(t *testing.T) {
	for _, tc := range []struct {
		online string
		cpus   int
		want   string // what is written for CPUs 1 to 3
	}{
		{"0", 3, "11?"}, {"0-3", 2, "?00"}, {"0,3", 2, "1?0"}, {"0-1", 2, "???"}, {"0-3", 0, "???"}, {"0", 9, "111"},
	} {
		m := machine(t, "0-3", tc.online, 1024)
		ctx, cancel := context.WithTimeout(t.Context(), margin+50*time.Millisecond)
		if _, memory, err := m.Online(ctx, tc.cpus, 0); err != nil || memory != 1<<20 {
			t.Error(memory, err)
		}
		cancel()
		got := ""
		for cpu := 1; cpu <= 3; cpu++ {
			b, err := os.ReadFile(filepath.Join(m.CPUs, fmt.Sprintf("cpu%d/online", cpu)))
			if err != nil {
				t.Fatal(err)
			}
			got += string(b)
		}
		if got != tc.want {
			t.Errorf("%d CPUs where %s are online: %q, want %q", tc.cpus, tc.online, got, tc.want)
		}
	}
}

func TestOnlineTellsWhatThereIs(t *testing.T) {
	m := machine(t, "0-1", "0", 1024)
	ctx, cancel := context.WithTimeout(t.Context(), margin+50*time.Millisecond)
	defer cancel()
	cpus, memory, err := m.Online(ctx, 2, 2<<20) // neither comes
	if cpus != 1 || memory != 1<<20 || err != nil || ctx.Err() != nil {
		t.Error(cpus, memory, err, ctx.Err())
	}
}

// Memory of which the kernel tells nothing is found nonetheless.
func TestOnlineWaitsForMemory(t *testing.T) {
	m := machine(t, "0", "0", 1024)
	type answer struct {
		memory uint64
		err    error
	}
	got := make(chan answer, 1)
	go func() {
		_, memory, err := m.Online(t.Context(), 1, 2<<20)
		got <- answer{memory, err}
	}()
	other := m.Meminfo + ".new"
	if err := os.WriteFile(other, []byte("MemTotal: 2048 kB\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, m.Meminfo); err != nil {
		t.Fatal(err)
	}
	if a := <-got; a.memory != 2<<20 || a.err != nil {
		t.Error(a)
	}
}

func TestMemoryThatIsAvailable(t *testing.T) {
	if n, err := machine(t, "0", "0", 1024).Available(); err != nil || n != 3<<10 {
		t.Errorf("%d, %v", n, err)
	}
}

func TestMemoryThatIsNone(t *testing.T) {
	m := machine(t, "0", "0", 1024)
	for _, content := range []string{"", "MemTotal: x kB\n", "MemTotal: 99999999999999999999 kB\n"} {
		if err := os.WriteFile(m.Meminfo, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if n, err := m.Memory(); err == nil {
			t.Errorf("%q: %d", content, n)
		}
	}
}
