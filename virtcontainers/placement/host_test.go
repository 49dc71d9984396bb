package placement

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestLists(t *testing.T) {
	for s, want := range map[string]struct {
		all    []int
		format string
	}{
		"":              {nil, ""},
		"\n":            {nil, ""},
		"0":             {[]int{0}, "0"},
		"0-2,7\n":       {[]int{0, 1, 2, 7}, "0-2,7"},
		"7,0-2,1,2-3":   {[]int{0, 1, 2, 3, 7}, "0-3,7"},
		"1,3,5":         {[]int{1, 3, 5}, "1,3,5"},
		"1,2":           {[]int{1, 2}, "1-2"},
		"8190-8191,5-5": {[]int{5, 8190, 8191}, "5,8190-8191"},
	} {
		got, err := ParseList(s)
		if err != nil || !slices.Equal(got, want.all) || FormatList(got) != want.format {
			t.Errorf("%q: %v, %v, %q, want %v", s, got, err, FormatList(got), want)
		}
	}
	for _, s := range []string{"-", "-1", "1-", "3-1", "0,", ",", "a", "0-4:2/4", "8192", "0-99999999", "0-18446744073709551615", "1 2", "+1", "0x1"} {
		if got, err := ParseList(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func FuzzParseList(f *testing.F) {
	f.Add("0-2,7")
	f.Fuzz(func(t *testing.T, s string) {
		all, err := ParseList(s)
		if err != nil {
			return
		}
		if again, err := ParseList(FormatList(all)); err != nil || !slices.Equal(all, again) {
			t.Errorf("%q: %v, then %v, %v", s, all, again, err)
		}
	})
}

func TestReadHost(t *testing.T) {
	root := t.TempDir()
	if _, err := ReadHost(root); err == nil {
		t.Error("a host without CPUs")
	}
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(root, "sys/devices/system", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("cpu/online", "0-2,4\n")
	h, err := ReadHost(root)
	if diff := cmp.Diff(Host{CPUs: []int{0, 1, 2, 4}, Nodes: map[int][]int{0: {0, 1, 2, 4}}}, h); err != nil || diff != "" {
		t.Errorf("without nodes: %v %s", err, diff)
	}
	write("node/online", "0,2\n")
	if _, err := ReadHost(root); err == nil {
		t.Error("nodes without CPUs are read")
	}
	write("node/node0/cpulist", "0-2,4\n")
	write("node/node2/cpulist", "\n") // memory alone
	h, err = ReadHost(root)
	if diff := cmp.Diff(Host{CPUs: []int{0, 1, 2, 4}, Nodes: map[int][]int{0: {0, 1, 2, 4}, 2: nil}}, h); err != nil || diff != "" {
		t.Errorf("with nodes: %v %s", err, diff)
	}
	write("cpu/online", "none")
	if _, err := ReadHost(root); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

func TestReadThisHost(t *testing.T) {
	h, err := ReadHost("/")
	if err != nil {
		t.Fatal(err)
	}
	var all []int
	for _, cpus := range h.Nodes {
		all = append(all, cpus...)
	}
	slices.Sort(all)
	if len(h.CPUs) == 0 || !slices.Equal(all, h.CPUs) {
		t.Errorf("%+v", h)
	}
}

func affinity(t *testing.T, tid int) []int {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(tid, &set); err != nil {
		t.Fatal(err)
	}
	var cpus []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}

// A process of several threads stands for the VM: one of them is the vCPU.
func TestApply(t *testing.T) {
	may := affinity(t, 0)
	if len(may) < 2 {
		t.Skip("two CPUs are needed, and this process may use", len(may))
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PLACEMENT_THREADS=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // it ends when its input does
	defer in.Close()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	tids, err := threads(pid)
	if err != nil || len(tids) < 2 {
		t.Fatalf("threads %v, %v", tids, err)
	}
	vcpu := tids[1]
	p := Plan{VCPUs: [][]int{may[:1]}, Helpers: may[1:]}
	const gone = 1 << 22 // above what pids come to
	if err := p.Apply(map[int]int{0: vcpu}, []int{pid, gone}); err != nil {
		t.Fatal(err)
	}
	after, err := threads(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range after {
		want := may[1:]
		if tid == vcpu {
			want = may[:1]
		}
		if got := affinity(t, tid); !slices.Equal(got, want) {
			t.Errorf("thread %d of %v may run on %v, want %v", tid, after, got, want)
		}
	}
	// A plan that binds nothing gives all back, and a thread that has ended is nothing.
	if err := (Plan{VCPUs: make([][]int, 2)}).Apply(map[int]int{0: vcpu, 1: gone}, []int{pid}); err != nil {
		t.Fatal(err)
	}
	for _, tid := range after {
		if got := affinity(t, tid); len(got) < len(may) {
			t.Errorf("thread %d may still run on %v alone", tid, got)
		}
	}
	err = p.Apply(map[int]int{0: vcpu, 1: vcpu}, nil)
	if err == nil || !strings.Contains(err.Error(), "vCPU 1: the plan has 1") {
		t.Errorf("a vCPU too many: %v", err)
	}
	err = Plan{VCPUs: [][]int{{1024}}}.Apply(map[int]int{0: vcpu}, nil)
	if err == nil || !strings.Contains(err.Error(), "CPU 1024: only the first 1024") {
		t.Errorf("a CPU too high: %v", err)
	}
}

// TestMain is also the process of TestApply.
func TestMain(m *testing.M) {
	if os.Getenv("PLACEMENT_THREADS") == "" {
		os.Exit(m.Run())
	}
	ready, end := make(chan bool), make(chan bool)
	for range 3 {
		go func() {
			runtime.LockOSThread()
			ready <- true
			<-end
		}()
		<-ready
	}
	os.Stdout.WriteString("r")     //nolint:errcheck // then the test fails
	os.Stdin.Read(make([]byte, 1)) //nolint:errcheck // until it is closed
	close(end)
}
