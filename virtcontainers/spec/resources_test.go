package spec

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// leaves are the JSON paths of all fields of a type.
func leaves(t reflect.Type, path string) []string {
	switch t.Kind() {
	case reflect.Pointer:
		return leaves(t.Elem(), path)
	case reflect.Slice:
		return leaves(t.Elem(), path+"[]")
	case reflect.Map:
		return leaves(t.Elem(), path+"{}")
	case reflect.Struct:
		var all []string
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Anonymous && name == "":
				all = append(all, leaves(f.Type, path)...)
			case path == "":
				all = append(all, leaves(f.Type, name)...)
			default:
				all = append(all, leaves(f.Type, path+"."+name)...)
			}
		}
		return all
	}
	return []string{path}
}

func resources(t *testing.T, text string) *specs.LinuxResources {
	t.Helper()
	r := &specs.LinuxResources{}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(r); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return r
}

const refused = "refused"

// Every field there is: the guest enforces it, it says where the VM is placed, or it
// is refused by its name.
func TestEveryResource(t *testing.T) {
	same := func(s string) [2]string { return [2]string{s, s} }
	cases := map[string][2]string{ // by path: a resource, and what the guest gets
		"devices[].allow":  same(`{"devices":[{"allow":true,"access":"rwm"}]}`),
		"devices[].type":   same(`{"devices":[{"allow":true,"type":"c","access":"m"}]}`),
		"devices[].major":  same(`{"devices":[{"allow":true,"type":"c","major":136,"access":"rwm"}]}`),
		"devices[].minor":  {`{"devices":[{"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]}`, refused},
		"devices[].access": same(`{"devices":[{"allow":false,"access":"w"}]}`),

		"memory.limit":             same(`{"memory":{"limit":67108864}}`),
		"memory.reservation":       same(`{"memory":{"reservation":33554432}}`),
		"memory.swap":              same(`{"memory":{"limit":67108864,"swap":134217728}}`),
		"memory.kernel":            {`{"memory":{"kernel":1}}`, refused},
		"memory.kernelTCP":         {`{"memory":{"kernelTCP":1}}`, refused},
		"memory.swappiness":        {`{"memory":{"swappiness":60}}`, refused},
		"memory.disableOOMKiller":  {`{"memory":{"disableOOMKiller":true}}`, refused},
		"memory.useHierarchy":      {`{"memory":{"useHierarchy":false}}`, refused},
		"memory.checkBeforeUpdate": same(`{"memory":{"limit":67108864,"checkBeforeUpdate":true}}`),

		"cpu.shares":          same(`{"cpu":{"shares":1024}}`),
		"cpu.quota":           same(`{"cpu":{"quota":50000}}`),
		"cpu.burst":           {`{"cpu":{"quota":50000,"burst":20000}}`, `{"cpu":{"quota":50000,"burst":20000}}`},
		"cpu.period":          same(`{"cpu":{"period":100000}}`),
		"cpu.realtimeRuntime": {`{"cpu":{"realtimeRuntime":1}}`, refused},
		"cpu.realtimePeriod":  {`{"cpu":{"realtimePeriod":1}}`, refused},
		"cpu.cpus":            {`{"cpu":{"cpus":"0-3"}}`, `{}`},
		"cpu.mems":            {`{"cpu":{"mems":"0"}}`, `{}`},
		"cpu.idle":            same(`{"cpu":{"idle":1}}`),

		"pids.limit": same(`{"pids":{"limit":20}}`),

		"blockIO.weight":                          {`{"blockIO":{"weight":500}}`, refused},
		"blockIO.leafWeight":                      {`{"blockIO":{"leafWeight":500}}`, refused},
		"blockIO.weightDevice[].major":            {`{"blockIO":{"weightDevice":[{"major":8,"minor":0}]}}`, refused},
		"blockIO.weightDevice[].minor":            {`{"blockIO":{"weightDevice":[{"major":8,"minor":1}]}}`, refused},
		"blockIO.weightDevice[].weight":           {`{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":1}]}}`, refused},
		"blockIO.weightDevice[].leafWeight":       {`{"blockIO":{"weightDevice":[{"major":8,"minor":0,"leafWeight":1}]}}`, refused},
		"blockIO.throttleReadBpsDevice[].major":   {`{"blockIO":{"throttleReadBpsDevice":[{"major":8}]}}`, refused},
		"blockIO.throttleReadBpsDevice[].minor":   {`{"blockIO":{"throttleReadBpsDevice":[{"minor":8}]}}`, refused},
		"blockIO.throttleReadBpsDevice[].rate":    {`{"blockIO":{"throttleReadBpsDevice":[{"rate":8}]}}`, refused},
		"blockIO.throttleWriteBpsDevice[].major":  {`{"blockIO":{"throttleWriteBpsDevice":[{"major":8}]}}`, refused},
		"blockIO.throttleWriteBpsDevice[].minor":  {`{"blockIO":{"throttleWriteBpsDevice":[{"minor":8}]}}`, refused},
		"blockIO.throttleWriteBpsDevice[].rate":   {`{"blockIO":{"throttleWriteBpsDevice":[{"rate":8}]}}`, refused},
		"blockIO.throttleReadIOPSDevice[].major":  {`{"blockIO":{"throttleReadIOPSDevice":[{"major":8}]}}`, refused},
		"blockIO.throttleReadIOPSDevice[].minor":  {`{"blockIO":{"throttleReadIOPSDevice":[{"minor":8}]}}`, refused},
		"blockIO.throttleReadIOPSDevice[].rate":   {`{"blockIO":{"throttleReadIOPSDevice":[{"rate":8}]}}`, refused},
		"blockIO.throttleWriteIOPSDevice[].major": {`{"blockIO":{"throttleWriteIOPSDevice":[{"major":8}]}}`, refused},
		"blockIO.throttleWriteIOPSDevice[].minor": {`{"blockIO":{"throttleWriteIOPSDevice":[{"minor":8}]}}`, refused},
		"blockIO.throttleWriteIOPSDevice[].rate":  {`{"blockIO":{"throttleWriteIOPSDevice":[{"rate":8}]}}`, refused},

		"hugepageLimits[].pageSize": {`{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}`, `{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}`},
		"hugepageLimits[].limit":    {`{"hugepageLimits":[{"pageSize":"1GB","limit":1073741824}]}`, `{"hugepageLimits":[{"pageSize":"1GB","limit":1073741824}]}`},

		"network.classID":               {`{"network":{"classID":7}}`, refused},
		"network.priorities[].name":     {`{"network":{"priorities":[{"name":"eth0"}]}}`, refused},
		"network.priorities[].priority": {`{"network":{"priorities":[{"priority":1}]}}`, refused},

		"rdma{}.hcaHandles": {`{"rdma":{"mlx5_1":{"hcaHandles":1}}}`, refused},
		"rdma{}.hcaObjects": {`{"rdma":{"mlx5_1":{"hcaObjects":1}}}`, refused},

		"unified{}": same(`{"unified":{"memory.high":"33554432"}}`),
	}
	all := leaves(reflect.TypeFor[specs.LinuxResources](), "")
	for _, path := range all {
		tt, ok := cases[path]
		if !ok {
			t.Errorf("%s is neither enforced, nor placed, nor refused", path)
			continue
		}
		parts := strings.FieldsFunc(path, func(r rune) bool { return strings.ContainsRune(".[]{}", r) })
		if leaf := parts[len(parts)-1]; !strings.Contains(tt[0], `"`+leaf+`":`) {
			t.Errorf("%s: the resource does not set it", path)
		}
		in := resources(t, tt[0])
		got, cpus, mems, err := Resources(in)
		if tt[1] == refused {
			// The parent's name is enough: of a device, all is refused or nothing.
			name := "linux.resources." + strings.Split(strings.Split(path, "[")[0], "{")[0]
			if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) || got != nil {
				t.Errorf("%s: %v, want NotImplemented that names %s", path, err, name)
			}
			continue
		}
		if diff := cmp.Diff(resources(t, tt[1]), got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", path, err, diff)
		}
		if (path == "cpu.cpus") != (cpus == "0-3") || (path == "cpu.mems") != (mems == "0") {
			t.Errorf("%s: cpus %q, mems %q", path, cpus, mems)
		}
		if !reflect.DeepEqual(in, resources(t, tt[0])) {
			t.Errorf("%s: what was given has changed", path)
		}
	}
	for path := range cases {
		if !slices.Contains(all, path) {
			t.Errorf("there is no %s", path)
		}
	}
}

// What is the host's is taken out, and all else goes to the guest as it is.
func TestResourcesOfTheGuest(t *testing.T) {
	for name, tt := range map[string]struct{ in, want, cpus, mems string }{
		"nothing":             {`{}`, `{}`, "", ""},
		"what says nothing":   {`{"cpu":{"shares":0},"memory":{"limit":0},"pids":{"limit":0}}`, `{"cpu":{"shares":0},"memory":{"limit":0},"pids":{"limit":0}}`, "", ""},
		"no limit":            {`{"cpu":{"quota":-1},"memory":{"limit":-1,"swap":-1},"pids":{"limit":-1}}`, `{"cpu":{"quota":-1},"memory":{"limit":-1,"swap":-1},"pids":{"limit":-1}}`, "", ""},
		"nothing but a place": {`{"cpu":{"cpus":"1"},"unified":{"cpuset.mems":"0"}}`, `{}`, "1", "0"},
		"placed by unified":   {`{"cpu":{"cpus":"0","mems":"0"},"unified":{"cpuset.cpus":"2-3","cpuset.mems":"1","cpu.weight":"50"}}`, `{"unified":{"cpu.weight":"50"}}`, "2-3", "1"},
		"all devices":         {`{"devices":[{"allow":true,"type":"a","access":"rwm"},{"allow":true,"type":"b","major":-1,"minor":-1,"access":"m"}]}`, `{"devices":[{"allow":true,"type":"a","access":"rwm"},{"allow":true,"type":"b","major":-1,"minor":-1,"access":"m"}]}`, "", ""},
		"denied devices":      {`{"devices":[{"allow":false,"type":"b","major":8,"minor":0,"access":"rwm"}]}`, `{"devices":[{"allow":false,"type":"b","major":8,"minor":0,"access":"rwm"}]}`, "", ""},
		"static devices":      {`{"devices":[{"allow":true,"type":"c","major":1,"access":"r"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]}`, `{"devices":[{"allow":true,"type":"c","major":1,"access":"r"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]}`, "", ""},
	} {
		got, cpus, mems, err := Resources(resources(t, tt.in))
		if diff := cmp.Diff(resources(t, tt.want), got); err != nil || diff != "" || cpus != tt.cpus || mems != tt.mems {
			t.Errorf("%s: %v, cpus %q, mems %q (-want +got):\n%s", name, err, cpus, mems, diff)
		}
	}
	if got, _, _, err := Resources(nil); got != nil || err != nil {
		t.Errorf("nil: %v, %v", got, err)
	}
}

func TestRefusedResources(t *testing.T) {
	for name, tt := range map[string]struct {
		in    string
		class func(error) bool
		want  []string
	}{
		"the host's cpus by unified": {`{"unified":{"cpuset.cpus.partition":"root","cpuset.cpus.exclusive":"1"}}`, errdefs.IsNotImplemented, []string{"unified (cpuset.cpus.partition)", "unified (cpuset.cpus.exclusive)"}},
		"the host's disks":           {`{"unified":{"io.max":"8:0 rbps=1","io.weight":"50","rdma.max":"x","misc.max":"y"}}`, errdefs.IsNotImplemented, []string{"(io.max)", "(io.weight)", "(rdma.max)", "(misc.max)"}},
		"deeds":                      {`{"unified":{"cgroup.freeze":"1","cgroup.kill":"1","memory.reclaim":"1M","cgroup.procs":"1"}}`, errdefs.IsNotImplemented, []string{"(cgroup.freeze)", "(cgroup.kill)", "(memory.reclaim)", "(cgroup.procs)"}},
		"paths":                      {`{"unified":{"../cpu.max":"1","cpu.max/":"1"}}`, errdefs.IsNotImplemented, []string{"(../cpu.max)", "(cpu.max/)"}},
		"another size of pages":      {`{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}`, errdefs.IsInvalidArgument, []string{`hugepageLimits[0].pageSize: "../2MB"`}},
		"numbers":                    {`{"memory":{"limit":-2,"swap":-7,"reservation":-1}}`, errdefs.IsInvalidArgument, []string{"memory.limit", "memory.swap", "memory.reservation"}},
		"a GPU":                      {`{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":226,"minor":0,"access":"rw"}]}`, errdefs.IsNotImplemented, []string{"devices[1]: the host's device c 226:0"}},
		"all of a kind":              {`{"devices":[{"allow":true,"type":"b","major":8,"access":"rw"}]}`, errdefs.IsNotImplemented, []string{"devices[0]: the host's device b 8:*"}},
	} {
		got, _, _, err := Resources(resources(t, tt.in))
		if !tt.class(err) || got != nil {
			t.Errorf("%s: %v, %v", name, got, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), "linux.resources.") || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v does not name %s", name, err, want)
			}
		}
	}
}

func TestTransformPlaces(t *testing.T) {
	sp := base()
	sp.Linux.Resources.CPU.Cpus, sp.Linux.Resources.CPU.Mems = "2-3", "1"
	p, err := Transform(sp, "c1", true)
	if err != nil || p.CPUs != "2-3" || p.Mems != "1" {
		t.Fatalf("%+v, %v", p, err)
	}
	if c := p.Spec.Linux.Resources.CPU; c.Cpus != "" || c.Mems != "" || *c.Quota != 50000 {
		t.Errorf("the guest gets %+v", c)
	}
	if sp.Linux.Resources.CPU.Cpus != "2-3" {
		t.Error("the spec that was given has changed")
	}
}
