package pod

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestPlaceOf(t *testing.T) {
	const (
		role, sandbox   = "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"
		crioRole, crioS = "io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"
	)
	for name, tt := range map[string]struct {
		annotations map[string]string
		want        Place
		refused     bool
	}{
		"none":                         {want: Place{Lone, "id"}},
		"others":                       {annotations: map[string]string{"a": "b"}, want: Place{Lone, "id"}},
		"sandbox container":            {annotations: map[string]string{role: "sandbox", sandbox: "id"}, want: Place{Sandbox, "id"}},
		"sandbox container without id": {annotations: map[string]string{role: "sandbox"}, want: Place{Sandbox, "id"}},
		"member":                       {annotations: map[string]string{role: "container", sandbox: "p"}, want: Place{Member, "p"}},
		"member by the id alone":       {annotations: map[string]string{sandbox: "p"}, want: Place{Member, "p"}},
		"first by the id alone":        {annotations: map[string]string{sandbox: "id"}, want: Place{Lone, "id"}},
		"CRI-O's sandbox container":    {annotations: map[string]string{crioRole: "sandbox", crioS: "id"}, want: Place{Sandbox, "id"}},
		"CRI-O's member":               {annotations: map[string]string{crioRole: "container", crioS: "p"}, want: Place{Member, "p"}},
		"member without a pod":         {annotations: map[string]string{role: "container"}, refused: true},
		"another's sandbox container":  {annotations: map[string]string{role: "sandbox", sandbox: "p"}, refused: true},
		"no role":                      {annotations: map[string]string{role: "init", sandbox: "p"}, refused: true},
		"CRI-O's, no role":             {annotations: map[string]string{crioRole: "init", crioS: "p"}, refused: true},
	} {
		got, err := PlaceOf(tt.annotations, "id")
		if got != tt.want || errdefs.IsInvalidArgument(err) != tt.refused || err != nil && !tt.refused {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
}

func TestReadPlace(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadPlace(dir, "id"); err == nil {
		t.Error("a bundle without a spec says where its container belongs")
	}
	for spec, ok := range map[string]bool{`{}`: true, `{"annotations":1}`: false} {
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(spec), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadPlace(dir, "id"); ok != (err == nil) || !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", spec, err)
		}
	}
}

// field encodes a length-delimited field.
func field(n protowire.Number, parts ...[]byte) []byte {
	var v []byte
	for _, p := range parts {
		v = append(v, p...)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), v)
}

func varint(n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
}

func text(n protowire.Number, s string) []byte { return field(n, []byte(s)) }

// The numbers are those of k8s.io/cri-api, runtime/v1.
func TestDecode(t *testing.T) {
	number := protowire.AppendVarint(protowire.AppendTag(nil, 3, protowire.VarintType), 2)
	raw := field(0xfff, text(1, "later")) // a field that is not known
	for _, part := range [][]byte{
		field(1, text(1, "name"), text(2, "uid"), text(3, "default"), number),
		text(2, "web0"), text(3, "/var/log/pods/x"),
		field(4, text(1, "10.0.0.10"), text(1, "fd00::a"), text(2, "svc.local"), text(2, "local"), text(3, "ndots:5")),
		field(6, text(1, "label"), text(2, "value")),
		field(7, text(1, "io.husk.default_vcpus"), text(2, "2")), field(7, text(1, "other")),
		field(8, text(1, "/kubepods"), number, field(3, text(1, "net.ipv4.ip_forward"), text(2, "1")), field(3, text(1, "kernel.shm_rmid_forced"), text(2, "0")),
			field(4, varint(1, 1), varint(2, 2), varint(4, 3)), // the overhead
			field(5, varint(1, 100000), varint(2, 250000), varint(3, 2), varint(4, 3<<30), text(6, "0-1"), varint(10, 9))),
	} {
		raw = append(raw, part...)
	}
	got, err := Decode(raw)
	want := Config{
		Hostname:     "web0",
		DNS:          &DNS{Servers: []string{"10.0.0.10", "fd00::a"}, Searches: []string{"svc.local", "local"}, Options: []string{"ndots:5"}},
		CgroupParent: "/kubepods",
		Sysctls:      map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "0"},
		Annotations:  map[string]string{"io.husk.default_vcpus": "2", "other": ""},
		Resources:    Resources{CPUQuota: 250000, CPUPeriod: 100000, MemoryBytes: 3 << 30},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v: %s", err, diff)
	}
	if got, want := got.DNS.ResolvConf(), "search svc.local local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"; got != want {
		t.Errorf("resolv.conf: %q, want %q", got, want)
	}
	for _, garbage := range []string{"\xff", "\x12\x05ab", "\x18\xff", "\x22\x01\xff", "\x42\x03\x1a\x01\xff", "\x3a\x01\xff", "\x42\x03\x2a\x01\x08"} {
		if c, err := Decode([]byte(garbage)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v, %v, want InvalidArgument", garbage, c, err)
		}
	}
	if c, err := Decode(nil); err != nil || !cmp.Equal(c, Config{}) || (&DNS{}).ResolvConf() != "" {
		t.Errorf("nothing: %+v, %v", c, err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("\x12\x04web0"))
	f.Fuzz(func(_ *testing.T, raw []byte) { Decode(raw) }) //nolint:errcheck // it must not panic
}

func TestIsConfig(t *testing.T) {
	for url, want := range map[string]bool{
		"runtime.v1.PodSandboxConfig": true, "types.googleapis.com/runtime.v1.PodSandboxConfig": true,
		"runtimeoptions.v1.Options": false, "": false,
	} {
		if got := IsConfig(&anypb.Any{TypeUrl: url}); got != want {
			t.Errorf("%q: %v", url, got)
		}
	}
	if IsConfig(nil) {
		t.Error("no options are CRI's")
	}
}

func TestResourcesOf(t *testing.T) {
	const period, quota, memory = "io.kubernetes.cri.sandbox-cpu-period", "io.kubernetes.cri.sandbox-cpu-quota", "io.kubernetes.cri.sandbox-memory"
	const crio, older = "pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"
	for name, tt := range map[string]struct {
		annotations map[string]string
		want        Resources
		refused     bool
	}{
		"none":              {map[string]string{"a": "b", "io.kubernetes.cri.sandbox-cpu-shares": "2"}, Resources{}, false},
		"containerd's":      {map[string]string{period: "100000", quota: "150000", memory: "268435456"}, Resources{150000, 100000, 1 << 28}, false},
		"no limits":         {map[string]string{period: "0", quota: "0", memory: "0"}, Resources{}, false},
		"memory alone":      {map[string]string{period: "100000", quota: "0", memory: "1"}, Resources{0, 100000, 1}, false},
		"no number":         {map[string]string{memory: "256Mi"}, Resources{}, true},
		"too large":         {map[string]string{quota: "9223372036854775808"}, Resources{}, true},
		"CRI-O's":           {map[string]string{crio: `{"cpu_period":100000,"cpu_quota":20000,"cpu_shares":204,"memory_limit_in_bytes":9}`}, Resources{20000, 100000, 9}, false},
		"CRI-O's older one": {map[string]string{older: `{"memory_limit_in_bytes":9}`}, Resources{0, 0, 9}, false},
		"CRI-O has none":    {map[string]string{crio: "null", older: "null"}, Resources{}, false},
		"CRI-O's, broken":   {map[string]string{crio: "{"}, Resources{}, true},
	} {
		got, err := ResourcesOf(tt.annotations)
		if got != tt.want || errdefs.IsInvalidArgument(err) != tt.refused || err != nil && !tt.refused {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
}
