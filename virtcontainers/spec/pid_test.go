package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestAPathOfAPIDNamespaceIsATargetsWhereAnotherHasItsOwn(t *testing.T) {
	join := []specs.LinuxNamespace{{Type: specs.IPCNamespace}, {Type: specs.PIDNamespace, Path: "/proc/4711/ns/pid"}}
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		own        []string
		want       []specs.LinuxNamespace
		ownPID     bool
		refused    bool
	}{
		"nobody has its own": {
			namespaces: join, own: nil,
			want: []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/run/husk/ns/pid"}},
		},
		"one has": {
			namespaces: join, own: []string{"a"},
			want: []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/run/husk/ns/pid-of/a"}},
		},
		"two have": {namespaces: join, own: []string{"a", "b"}, refused: true},
		"this one too": {
			namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}}, own: []string{"a", "b"},
			want: []specs.LinuxNamespace{{Type: specs.PIDNamespace}}, ownPID: true,
		},
		"this one has the guest's": {namespaces: nil, own: []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			sp := base()
			sp.Linux.Namespaces = slices.Clone(tt.namespaces)
			p, err := Transform(sp, "c1", true)
			if err != nil {
				t.Fatal(err)
			}
			err = p.JoinPID(tt.own)
			if tt.refused {
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux.namespaces (pid).path") || !strings.Contains(err.Error(), ": a, b; ") {
					t.Errorf("error %v, want FailedPrecondition that names the field and both containers", err)
				}
				return
			}
			got := slices.DeleteFunc(slices.Clone(p.Spec.Linux.Namespaces), func(ns specs.LinuxNamespace) bool { return ns.Type != specs.PIDNamespace })
			if err != nil || !slices.Equal(got, tt.want) || p.OwnPID != tt.ownPID {
				t.Errorf("namespaces %v, own %t, %v; want %v, %t", got, p.OwnPID, err, tt.want, tt.ownPID)
			}
			if !slices.Equal(sp.Linux.Namespaces, tt.namespaces) {
				t.Errorf("the spec's own namespaces have become %v", sp.Linux.Namespaces)
			}
		})
	}
}
