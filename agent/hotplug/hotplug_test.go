package hotplug

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/husk-containers/husk/agent/cgroup"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// machine is one of files: of the CPUs present all but the first can be switched, and
// nothing comes of it.
func machine(t *testing.T, present, online string, memoryKiB int) *Machine {
	t.Helper()
	dir := t.TempDir()
	files := Files{
		CPUs: filepath.Join(dir, "cpu"), Meminfo: filepath.Join(dir, "meminfo"), MinFree: filepath.Join(dir, "min_free_kbytes"),
		Containers: cgroup.Dir(dir),
	}
	contents := map[string]string{
		"cpu/present": present + "\n", "cpu/online": online + "\n",
		"meminfo": meminfo(memoryKiB), "min_free_kbytes": "67584\n",
		"memory.max": "", "memory.current": "0\n",
	}
	cpus, err := cgroup.ParseSet(present)
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range cpus[1:] {
		contents[fmt.Sprintf("cpu/cpu%d/online", cpu)] = "?"
	}
	for name, content := range contents {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m, err := New(files)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func meminfo(kib int) string {
	return fmt.Sprintf("MemTotal:  %d kB\nMemFree: 1 kB\nMemAvailable: %d kB\n", kib, kib/2)
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
		if a, err := m.Online(ctx, tc.cpus, 0); err != nil || a.MemoryBytes != 1<<20 || a.AvailableBytes != 1<<19 {
			t.Error(a, err)
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
	a, err := m.Online(ctx, 2, 2<<20) // neither comes
	if err != nil || a.Cpus != 1 || a.MemoryBytes != 1<<20 || ctx.Err() != nil {
		t.Error(a, err, ctx.Err())
	}
}

// Memory of which the kernel tells nothing is found nonetheless.
func TestOnlineWaitsForMemory(t *testing.T) {
	m := machine(t, "0", "0", 1024)
	got, failed := make(chan *agentv1.OnlineResourcesResponse, 1), make(chan error, 1)
	go func() {
		a, err := m.Online(t.Context(), 1, 2<<20)
		got <- a
		failed <- err
	}()
	replace(t, m.Meminfo, meminfo(2048))
	if a, err := <-got, <-failed; err != nil || a.MemoryBytes != 2<<20 {
		t.Error(a, err)
	}
}

func replace(t *testing.T, file, content string) {
	t.Helper()
	err := os.WriteFile(file+".new", []byte(content), 0o644)
	if err == nil {
		err = os.Rename(file+".new", file)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What the kernel has raised comes down again, and stays above what it was at boot.
func TestFit(t *testing.T) {
	for _, tc := range []struct {
		boot, now int // MiB
		kept      int // KiB at boot
		max, min  string
	}{
		{512, 512, 2896, "486539264", "2896"},
		{512, 2048, 2896, "2097152000", "5792"},
		{2048, 512, 5792, "486539264", "5792"},
		{512, 1024, 67584, "1023410176", "67584"},
		{64, 64, 100, "33554432", "1024"},
	} {
		m := machine(t, "0", "0", tc.boot<<10)
		replace(t, m.MinFree, fmt.Sprintln(tc.kept))
		m, err := New(m.Files)
		if err != nil {
			t.Fatal(err)
		}
		replace(t, m.Meminfo, meminfo(tc.now<<10))
		replace(t, m.MinFree, "45056\n")
		replace(t, filepath.Join(string(m.Containers), "memory.max"), "")
		if err := m.Fit(); err != nil {
			t.Fatal(err)
		}
		for file, want := range map[string]string{m.MinFree: tc.min, filepath.Join(string(m.Containers), "memory.max"): tc.max} {
			if got, err := os.ReadFile(file); string(got) != want || err != nil {
				t.Errorf("%+v: %s is %q, %v", tc, filepath.Base(file), got, err)
			}
		}
	}
}

func TestMemoryThatIsNone(t *testing.T) {
	m := machine(t, "0", "0", 1024)
	for _, content := range []string{"", "MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB\n", "MemTotal: 1 kB\n"} {
		if err := os.WriteFile(m.Meminfo, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if n, _, err := m.memory(); err == nil {
			t.Errorf("%q: %d", content, n)
		}
	}
}
