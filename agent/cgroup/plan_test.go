package cgroup

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// limits has, for each field of LinuxResources and of what is in it, by its path in
// JSON, resources that set it and what the cgroup's files are told then; nothing where
// the field is refused by its name, and "none" where there is nothing to tell.
var limits = map[string]struct {
	resources string
	want      string
}{
	"memory.limit":                     {`{"memory":{"limit":1048576}}`, "memory.max=1048576"},
	"memory.reservation":               {`{"memory":{"reservation":4096}}`, "memory.low=4096"},
	"memory.swap":                      {`{"memory":{"limit":100,"swap":150}}`, "memory.swap.max=50 memory.max=100"},
	"memory.kernel":                    {`{"memory":{"kernel":1}}`, ""},
	"memory.kernelTCP":                 {`{"memory":{"kernelTCP":1}}`, ""},
	"memory.swappiness":                {`{"memory":{"swappiness":1}}`, ""},
	"memory.disableOOMKiller":          {`{"memory":{"disableOOMKiller":true}}`, ""},
	"memory.useHierarchy":              {`{"memory":{"useHierarchy":true}}`, "none"},
	"memory.checkBeforeUpdate":         {`{"memory":{"checkBeforeUpdate":true}}`, "none"},
	"cpu.shares":                       {`{"cpu":{"shares":1024}}`, "cpu.weight=39"},
	"cpu.quota":                        {`{"cpu":{"quota":50000}}`, "cpu.max=50000 100000"},
	"cpu.burst":                        {`{"cpu":{"burst":5,"quota":50000}}`, "cpu.max.burst=0 cpu.max=50000 100000 cpu.max.burst=5"},
	"cpu.period":                       {`{"cpu":{"period":20000}}`, "cpu.max=max 20000"},
	"cpu.realtimeRuntime":              {`{"cpu":{"realtimeRuntime":1}}`, ""},
	"cpu.realtimePeriod":               {`{"cpu":{"realtimePeriod":1}}`, ""},
	"cpu.cpus":                         {`{"cpu":{"cpus":"0-1"}}`, "cpuset.cpus=0-1"},
	"cpu.mems":                         {`{"cpu":{"mems":"0"}}`, "cpuset.mems=0"},
	"cpu.idle":                         {`{"cpu":{"idle":1,"shares":2}}`, "cpu.weight=1 cpu.idle=1"},
	"pids.limit":                       {`{"pids":{"limit":8}}`, "pids.max=8"},
	"blockIO.weight":                   {`{"blockIO":{"weight":1}}`, ""},
	"blockIO.leafWeight":               {`{"blockIO":{"leafWeight":1}}`, ""},
	"blockIO.weightDevice":             {`{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":1}]}}`, ""},
	"blockIO.throttleReadBpsDevice":    {`{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":9}]}}`, "io.max=8:1 rbps=9"},
	"blockIO.throttleWriteBpsDevice":   {`{"blockIO":{"throttleWriteBpsDevice":[{"major":8,"minor":1,"rate":9}]}}`, "io.max=8:1 wbps=9"},
	"blockIO.throttleReadIOPSDevice":   {`{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":1,"rate":9}]}}`, "io.max=8:1 riops=9"},
	"blockIO.throttleWriteIOPSDevice":  {`{"blockIO":{"throttleWriteIOPSDevice":[{"major":8,"minor":1,"rate":0}]}}`, "io.max=8:1 wiops=max"},
	"hugepageLimits":                   {`{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}`, "hugetlb.2MB.max=4194304 hugetlb.2MB.rsvd.max=4194304"},
	"network.classID":                  {`{"network":{"classID":1}}`, ""},
	"network.priorities":               {`{"network":{"priorities":[{"name":"eth0","priority":1}]}}`, ""},
	"rdma":                             {`{"rdma":{"mlx5_0":{"hcaHandles":1}}}`, ""},
	"unified":                          {`{"unified":{"memory.high":"max","io.max":"8:0 rbps=1\n8:1 rbps=2"}}`, "io.max=8:0 rbps=1 io.max=8:1 rbps=2 memory.high=max"},
	"devices":                          {`{"devices":[{"allow":true,"access":"rwm"}]}`, "none"},
	"unified, a command":               {`{"unified":{"cgroup.kill":"1"}}`, ""},
	"unified, a path":                  {`{"unified":{"../memory.max":"1"}}`, ""},
	"unified, a watch":                 {`{"unified":{"cpu.pressure":"some 1 2"}}`, ""},
	"memory.limit, none":               {`{"memory":{"limit":-1}}`, "memory.max=max"},
	"memory.limit, not said":           {`{"memory":{"limit":0,"swap":0},"cpu":{"shares":0,"quota":0},"pids":{"limit":0}}`, "none"},
	"memory.swap, none":                {`{"memory":{"swap":-1}}`, "memory.swap.max=max"},
	"memory.swap, limit as it is":      {`{"memory":{"swap":3000}}`, "memory.swap.max=1000"},
	"cpu.quota, none":                  {`{"cpu":{"quota":-1,"period":1000}}`, "cpu.max=max 1000"},
	"cpu.shares, fewest":               {`{"cpu":{"shares":1}}`, "cpu.weight=1"},
	"cpu.shares, most":                 {`{"cpu":{"shares":1000000}}`, "cpu.weight=10000"},
	"cpu.idle, no longer":              {`{"cpu":{"idle":0,"shares":262144}}`, "cpu.idle=0 cpu.weight=10000"},
	"pids.limit, none":                 {`{"pids":{"limit":-1}}`, "pids.max=max"},
	"memory.limit, after all the rest": {`{"memory":{"limit":1},"pids":{"limit":1},"unified":{"memory.high":"5"}}`, "pids.max=1 memory.high=5 memory.max=1"},
}

// paths lists the fields of a type by their paths in JSON, down to what is no struct.
func paths(t reflect.Type, prefix string) []string {
	var all []string
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		if ft.Kind() == reflect.Struct {
			all = append(all, paths(ft, prefix+name+".")...)
		} else {
			all = append(all, prefix+name)
		}
	}
	return all
}

func decode(t *testing.T, s string) *specs.LinuxResources {
	t.Helper()
	r := &specs.LinuxResources{}
	if err := json.Unmarshal([]byte(s), r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEveryFieldIsWrittenOrRefused(t *testing.T) {
	for _, path := range paths(reflect.TypeFor[specs.LinuxResources](), "") {
		if _, ok := limits[path]; !ok {
			t.Errorf("%s is not in the table", path)
		}
	}
	current := map[string]string{"cpu.max": "max 100000", "memory.max": "2000"}
	for path, tc := range limits {
		writes, err := newPlan(decode(t, tc.resources), func(file string) string { return current[file] })
		if tc.want == "" {
			field, _, _ := strings.Cut(path, ",")
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
				t.Errorf("%s: %v, want a refusal that names it", path, err)
			}
			continue
		}
		var got []string
		for _, w := range writes {
			got = append(got, w.file+"="+w.value)
		}
		if s := strings.Join(got, " "); err != nil || s != tc.want && (s != "" || tc.want != "none") {
			t.Errorf("%s: %q, %v; want %q", path, s, err, tc.want)
		}
	}
}

func TestPlanRefusesContradictions(t *testing.T) {
	for _, s := range []string{
		`{"memory":{"limit":100,"swap":50}}`,
		`{"memory":{"swap":50}}`,
		`{"memory":{"limit":1},"unified":{"memory.max":"2"}}`,
		`{"cpu":{"idle":2}}`,
	} {
		if _, err := newPlan(decode(t, s), func(string) string { return "max" }); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", s, err)
		}
	}
	// One error names all that is refused.
	_, err := newPlan(decode(t, `{"memory":{"kernel":1,"kernelTCP":1,"swappiness":0},"rdma":{"a":{}}}`), func(string) string { return "" })
	if err == nil || !strings.Contains(err.Error(), "rdma, memory.kernel, memory.kernelTCP, memory.swappiness:") {
		t.Error(err)
	}
}

// scratch is a directory with files as those of a cgroup, and one above it.
func scratch(t *testing.T, files map[string]string) Dir {
	t.Helper()
	c := Dir(filepath.Join(t.TempDir(), "c"))
	if err := os.Mkdir(string(c), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(c.file(name), []byte(content+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestLimitWritesAllOrNothing(t *testing.T) {
	before := map[string]string{
		"pids.max": "max", "cpu.max": "max 100000", "cpu.weight": "100", "cpu.max.burst": "0", "cpu.idle": "0",
		"memory.max": "max", "memory.low": "0", "memory.swap.max": "max", "memory.current": "5000", "memory.reclaim": "", "memory.stat": "anon 4940\ninactive_file 30\nactive_file 30",
		"cpuset.cpus": "", "../cpuset.cpus.effective": "0-3", "io.max": "", "hugetlb.2MB.max": "max",
	}
	for name, tc := range map[string]struct {
		resources string
		class     func(error) bool // nil: it succeeds
		text      string
		want      map[string]string // but for what is as before
	}{
		"all":              {`{"memory":{"limit":6000},"cpu":{"shares":2,"quota":1000,"cpus":"1,3"},"pids":{"limit":3}}`, nil, "", map[string]string{"memory.max": "6000", "cpu.weight": "1", "cpu.max": "1000 100000", "cpuset.cpus": "1,3", "pids.max": "3"}},
		"without rsvd":     {`{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}`, nil, "", map[string]string{"hugetlb.2MB.max": "0"}},
		"below the use":    {`{"pids":{"limit":3},"memory":{"limit":4900}}`, errdefs.IsFailedPrecondition, "4900 bytes, and the container uses 5000", nil},
		"no such CPU":      {`{"pids":{"limit":3},"cpu":{"cpus":"3-4"}}`, errdefs.IsInvalidArgument, `"3-4", and the guest has "0-3"`, nil},
		"no such file":     {`{"pids":{"limit":3},"cpu":{"mems":"0"}}`, errdefs.IsInvalidArgument, "cpu.mems: the guest's kernel has no cpuset.mems", nil},
		"no such page":     {`{"pids":{"limit":3},"hugepageLimits":[{"pageSize":"1GB","limit":0}]}`, errdefs.IsInvalidArgument, "hugetlb.1GB.max", nil},
		"no list":          {`{"cpu":{"cpus":"a"}}`, errdefs.IsInvalidArgument, "no list of numbers", nil},
		"cache makes way":  {`{"memory":{"limit":4950}}`, errdefs.IsFailedPrecondition, "uses 5000", map[string]string{"memory.reclaim": "50"}}, // here it does not
		"unified in units": {`{"unified":{"memory.max":"4K"}}`, errdefs.IsFailedPrecondition, "4096 bytes", nil},
	} {
		t.Run(name, func(t *testing.T) {
			c := scratch(t, before)
			err := c.Limit(decode(t, tc.resources))
			switch {
			case tc.class == nil && err != nil, tc.class != nil && (!tc.class(err) || !strings.Contains(err.Error(), tc.text)):
				t.Errorf("%v, want %q", err, tc.text)
			}
			for file, value := range before {
				if want, ok := tc.want[file]; ok {
					value = want
				}
				if got := c.text(file); got != value && !strings.HasPrefix(got, value+"\n") {
					t.Errorf("%s is %q, want %q", file, got, value)
				}
			}
		})
	}
}

// The kernel's refusal comes by a file of /proc, which takes numbers alone.
func TestLimitUndoes(t *testing.T) {
	c := scratch(t, map[string]string{"pids.max": "max", "cpu.weight": "100", "io.max": "8:0 rbps=1 wbps=max riops=max wiops=max", "cpuset.cpus": ""})
	if err := os.Symlink("/proc/self/oom_score_adj", c.file("memory.high")); err != nil {
		t.Fatal(err)
	}
	err := c.Limit(decode(t, `{"pids":{"limit":3},"cpu":{"shares":5},"unified":{"io.max":"8:0 rbps=7","memory.high":"many"}}`))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `unified["memory.high"]: "many"`) {
		t.Error(err)
	}
	for file, want := range map[string]string{"pids.max": "max", "cpu.weight": "100", "io.max": "8:0 rbps=1 wbps=max riops=max wiops=max"} {
		if got := strings.Split(c.text(file), "\n")[0]; got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
}

func TestRestore(t *testing.T) {
	for _, tc := range [][3]string{
		{"8:1 rbps=5 wiops=3", "8:0 rbps=1", "8:1 rbps=max wiops=max"},
		{"8:1 rbps=5", "8:0 rbps=1\n8:1 rbps=2 wbps=max", "8:1 rbps=2 wbps=max"},
		{"8:1 200", "default 100", "8:1 default"},
		{"default 200", "default 100\n8:1 5", "default 100"},
		{"1000 2000", "max 100000", "max 100000"},
		{"5", "7", "7"},
		{"0-1", "", ""},
	} {
		if got := restore(tc[0], tc[1]); got != tc[2] {
			t.Errorf("%q over %q: %q, want %q", tc[0], tc[1], got, tc[2])
		}
	}
}

func TestLimitOfNoCgroup(t *testing.T) {
	err := Dir(filepath.Join(t.TempDir(), "none")).Limit(decode(t, `{"pids":{"limit":3}}`))
	if !errors.Is(err, errdefs.ErrNotFound) {
		t.Error(err)
	}
}

func TestParseSet(t *testing.T) {
	for list, want := range map[string][]int{"": nil, "0": {0}, "0-2,5\n": {0, 1, 2, 5}, "3,1-2": {1, 2, 3}, "1,1": {1}} {
		got, err := ParseSet(list)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%q: %s %v", list, diff, err)
		}
	}
	for _, list := range []string{"a", "2-1", "-1", "1-", "4096", "0-99999999999"} {
		if got, err := ParseSet(list); err == nil {
			t.Errorf("%q: %v", list, got)
		}
	}
}
