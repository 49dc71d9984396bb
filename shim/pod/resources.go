package pod

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protowire"
)

// Resources are the limits of a pod's containers together, as CRI's
// LinuxContainerResources has them when the pod is made; 0 is no word. What the
// pod's overhead is for, the host's side, is not in them.
type Resources struct {
	// CPUQuota and CPUPeriod are microseconds.
	CPUQuota, CPUPeriod int64
	MemoryBytes         int64
}

// containerd's annotations of a sandbox container: decimal numbers, in the units of
// Resources.
const (
	criCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	criCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	criMemory    = "io.kubernetes.cri.sandbox-memory"
)

// crioResources are CRI-O's, the newer name first: the whole message as JSON, or null.
var crioResources = []string{"pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"}

// ResourcesOf returns what the annotations of a sandbox container say of its pod. It is
// InvalidArgument where they make no sense.
func ResourcesOf(annotations map[string]string) (Resources, error) {
	var r Resources
	for _, f := range []struct {
		name string
		to   *int64
	}{{criCPUQuota, &r.CPUQuota}, {criCPUPeriod, &r.CPUPeriod}, {criMemory, &r.MemoryBytes}} {
		v, ok := annotations[f.name]
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return Resources{}, fmt.Errorf("annotation %s=%q: not a whole number: %w", f.name, v, errdefs.ErrInvalidArgument)
		}
		*f.to = n
	}
	for _, name := range crioResources {
		v, ok := annotations[name]
		if !ok || r != (Resources{}) {
			continue
		}
		var m struct {
			Quota  int64 `json:"cpu_quota"`
			Period int64 `json:"cpu_period"`
			Memory int64 `json:"memory_limit_in_bytes"`
		}
		if err := json.Unmarshal([]byte(v), &m); err != nil {
			return Resources{}, fmt.Errorf("annotation %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		r = Resources{CPUQuota: m.Quota, CPUPeriod: m.Period, MemoryBytes: m.Memory}
	}
	return r, nil
}

// Fields of CRI's LinuxContainerResources.
const (
	resourcesPeriod = 1
	resourcesQuota  = 2
	resourcesMemory = 4
)

func (r *Resources) decode(raw []byte) error {
	for len(raw) > 0 {
		number, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if n = protowire.ConsumeFieldValue(number, kind, raw); n < 0 {
			return protowire.ParseError(n)
		}
		if kind == protowire.VarintType {
			v, _ := protowire.ConsumeVarint(raw)
			switch number {
			case resourcesPeriod:
				r.CPUPeriod = int64(v)
			case resourcesQuota:
				r.CPUQuota = int64(v)
			case resourcesMemory:
				r.MemoryBytes = int64(v)
			}
		}
		raw = raw[n:]
	}
	return nil
}
