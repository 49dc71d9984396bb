package status

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/husk-containers/husk/internal/cpulist"
	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

func TestTable(t *testing.T) {
	pods, err := busy(t).host.Pods(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if err := WriteTable(&text, pods); err != nil {
		t.Fatal(err)
	}
	golden(t, "table", text.String())
}

func TestTableOfANamespace(t *testing.T) {
	pods, err := busy(t).host.Pods(t.Context(), "k8s.io")
	if err != nil || len(pods) != 1 || pods[0].ID != podID || len(pods[0].Shares) != 1 {
		t.Errorf("got %+v, %v", pods, err)
	}
	none, err := newTree(t).host.Pods(t.Context(), "")
	if raw, jerr := json.Marshal(none); err != nil || jerr != nil || string(raw) != "[]" {
		t.Errorf("of no pod: %s, %v, %v", raw, err, jerr)
	}
}

func TestPod(t *testing.T) {
	for _, name := range []string{"3f7", "web", "old"} {
		pod, err := busy(t).host.Pod(t.Context(), "", name)
		if err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		if err := WritePod(&text, pod); err != nil {
			t.Fatal(err)
		}
		golden(t, "pod-"+name, text.String())
		raw, err := json.MarshalIndent(pod, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "pod-"+name+".json", string(raw)+"\n")
	}
	if _, err := busy(t).host.Pod(t.Context(), "", "none"); err == nil || !strings.Contains(err.Error(), `no pod "none" in any namespace, of 3 in `) {
		t.Errorf("got %v", err)
	}
}

// What cannot be read is said, and the rest is shown.
func TestWhatIsUnknownIsSaid(t *testing.T) {
	tr := busy(t)
	tr.write("proc/200/smaps_rollup", "Pss: many kB\n")
	tr.write("proc/300/numa_maps", "7f0 N0=x\n")
	tr.write("proc/200/cgroup", "nothing\n")
	tr.write("proc/pressure/cpu", "some avg10=x\n")
	tr.write("proc/310/task/310/status", "Cpus_allowed_list:\t3-1\n")
	tr.write("state/k8s.io+"+podID+"/husk.json", "{")
	pod, err := tr.host.Pod(t.Context(), "", "3f7")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(pod.Unknown, "\n")
	for _, want := range []string{
		"record of the pod's processes: ", "threads of virtiofsd (pid 310): parse thread 310 of process 310",
		"memory of qemu-system-x86 (pid 200): ", "NUMA nodes of the memory of virtiofsd (pid 300): ", "cgroup of qemu-system-x86 (pid 200): ", "pressure: parse ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if len(pod.Processes) != 4 || len(pod.VCPUs) != 2 { // by their descent, without the record
		t.Errorf("got %+v, %+v", pod.Processes, pod.VCPUs)
	}
}

func TestAHostWhoseProcCannotBeRead(t *testing.T) {
	tr := busy(t)
	tr.host.Proc += "/none"
	if _, err := tr.host.Pods(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "list processes") {
		t.Errorf("got %v", err)
	}
}

func TestAnOperatorWhoGivesUp(t *testing.T) {
	tr := busy(t)
	ctx, cancel := context.WithCancel(t.Context())
	tr.host.Ask = func(context.Context, statedir.Shim) (*operatorv1.StatusResponse, error) {
		cancel()
		return nil, context.Canceled
	}
	if _, err := tr.host.Pods(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestPressureOfThePodsOwnCgroup(t *testing.T) {
	tr := busy(t)
	tr.write("proc/600/cgroup", "0::/kubepods/pod2\n")
	tr.write("sys/fs/cgroup/cgroup.controllers", "cpu memory io\n")
	tr.write("sys/fs/cgroup/kubepods/pod2/memory.pressure", "some avg10=12.00 avg60=3.50 avg300=0.00 total=1\nfull avg10=6.00 avg60=2.50 avg300=0.00 total=1\n")
	pod, err := tr.host.Pod(t.Context(), "", "web")
	if err != nil {
		t.Fatal(err)
	}
	want := []Pressure{{Resource: "cpu", Of: "host", Some10: 1.5, Some60: 0.25}, {Resource: "memory", Of: "pod", Some10: 12, Some60: 3.5, Full10: 6, Full60: 2.5}}
	if !slices.Equal(pod.Pressure, want) {
		t.Errorf("got %+v", pod.Pressure)
	}
}

func TestRelate(t *testing.T) {
	online := cpulist.Of(0, 1, 2, 3)
	pod := func(id, helpers string, vcpus ...string) *Pod {
		cpus, err := cpulist.Parse(helpers)
		if err != nil {
			t.Fatal(err)
		}
		p := &Pod{Namespace: "n", ID: id, Processes: []Process{{Name: "qemu", Affinities: []Affinity{{CPUs: cpus, Threads: 1}}}}}
		for i, list := range vcpus {
			if cpus, err = cpulist.Parse(list); err != nil {
				t.Fatal(err)
			}
			p.VCPUs = append(p.VCPUs, VCPU{Number: i, CPUs: cpus})
		}
		return p
	}
	for _, tt := range []struct {
		name           string
		p, o           *Pod
		shared, pinned string
		warnings       []string
		online         cpulist.Set
	}{
		{"apart", pod("a", "0", "1"), pod("b", "2", "3"), "none", "", nil, online},
		{"both anywhere", pod("a", "0-3", "0-3"), pod("b", "0-3", "0-3"), "0-3", "", nil, online},
		{"pinned to the same", pod("a", "0", "2", "3"), pod("b", "0", "3"), "0,3", "3", []string{"vCPUs of n/b are pinned to CPU 3 too"}, online},
		{"the other anywhere", pod("a", "0", "2", "3"), pod("b", "0-3", "0-3"), "0,2-3", "2-3", []string{"n/b may run on CPUs 2-3, to which vCPUs of this pod are pinned"}, online},
		{"the other pinned", pod("a", "0-3", "0-3"), pod("b", "0", "3"), "0,3", "3", nil, online},
		{"its own helpers", pod("a", "1-2", "2"), pod("b", "3", "3"), "none", "", []string{"the pod's own qemu may run on CPU 2, to which its vCPUs are pinned"}, online},
		{"one CPU in all", pod("a", "0", "0"), pod("b", "0", "0"), "0", "", nil, cpulist.Of(0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			shares, warnings := relate(tt.p, []*Pod{tt.o, tt.p}, tt.online)
			if !slices.Equal(warnings, tt.warnings) {
				t.Errorf("warnings %q", warnings)
			}
			switch {
			case tt.shared == "none" && len(shares) > 0:
				t.Errorf("shares %+v", shares)
			case tt.shared != "none" && (len(shares) != 1 || shares[0].ID != "b" || shares[0].CPUs.String() != tt.shared || shares[0].Pinned.String() != tt.pinned):
				t.Errorf("shares %+v", shares)
			}
		})
	}
}

func TestWarningsNameAFewOfMany(t *testing.T) {
	p := &Pod{Namespace: "n", ID: "p", VCPUs: []VCPU{{CPUs: cpulist.Of(1)}}}
	pods := []*Pod{p}
	for _, id := range []string{"a", "b", "c", "d", "e", "f"} {
		pods = append(pods, &Pod{Namespace: "n", ID: id, Processes: []Process{{Affinities: []Affinity{{cpulist.Of(0, 1), 1}}}}})
	}
	shares, warnings := relate(p, pods, cpulist.Of(0, 1))
	want := []string{"n/a, n/b, n/c, n/d and 2 more pods may run on CPU 1, to which vCPUs of this pod are pinned"}
	if len(shares) != 6 || !slices.Equal(warnings, want) {
		t.Errorf("got %d shares, %q", len(shares), warnings)
	}
}

// A process that was broken into can choose its name, and the names of its threads.
func TestAnotherProcessIsNotTakenForTheMonitor(t *testing.T) {
	tr := busy(t)
	tr.process(610, 600, "x", 400200, 0, task{"qemu\x1b[2J", "0-1", 0}, task{"CPU 7/KVM", "1", 0})
	tr.write("proc/610/cgroup", "0::/elsewhere\n")
	pod, err := tr.host.Pod(t.Context(), "", "web")
	if err != nil {
		t.Fatal(err)
	}
	last := pod.Processes[len(pod.Processes)-1]
	if last.Name != "qemu?[2J" || len(pod.VCPUs) != 1 || pod.VCPUs[0].Thread != 601 || pod.Cgroups[len(pod.Cgroups)-1].Path == "/elsewhere" {
		t.Errorf("got %+v, %+v, %+v", last, pod.VCPUs, pod.Cgroups)
	}
}
