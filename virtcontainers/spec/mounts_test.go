package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestBinds(t *testing.T) {
	for name, tt := range map[string]struct {
		mount specs.Mount
		want  Bind
	}{
		"bind":            {specs.Mount{Type: "bind", Options: []string{"bind"}}, Bind{}},
		"recursive":       {specs.Mount{Type: "bind", Options: []string{"rbind"}}, Bind{Recursive: true}},
		"by option":       {specs.Mount{Options: []string{"rbind"}}, Bind{Recursive: true}},
		"read-only":       {specs.Mount{Type: "bind", Options: []string{"rbind", "ro"}}, Bind{Recursive: true, ReadOnly: true}},
		"all read-only":   {specs.Mount{Type: "bind", Options: []string{"rbind", "rro"}}, Bind{Recursive: true, ReadOnly: true, AllReadOnly: true}},
		"follows":         {specs.Mount{Type: "bind", Options: []string{"rbind", "rslave"}}, Bind{Recursive: true, Follows: true}},
		"socket":          {specs.Mount{Type: "uds"}, Bind{Recursive: true, Socket: true}},
		"hosts":           {specs.Mount{Destination: "/etc//hosts", Type: "bind"}, Bind{Recursive: true, Role: SystemFile}},
		"not hosts":       {specs.Mount{Destination: "/etc/hosts/x", Type: "bind"}, Bind{Recursive: true}},
		"termination log": {specs.Mount{Destination: "/dev/termination-log", Type: "bind"}, Bind{Recursive: true, Role: TerminationLog}},
		"of another name": {specs.Mount{Destination: "/last/words", Type: "bind"}, Bind{Recursive: true, Role: TerminationLog}},
	} {
		sp := base()
		if tt.mount.Destination == "" {
			tt.mount.Destination = "/data"
		}
		tt.mount.Source = "/srv"
		sp.Mounts = []specs.Mount{{Destination: "/a", Type: "tmpfs"}, tt.mount}
		sp.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/last/words"}
		p, err := Transform(sp, "c1", true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(p.Binds) != 1 {
			t.Errorf("%s: binds %v", name, p.Binds)
			continue
		}
		got := *p.Binds[0]
		got.At("/run/husk/x", false)
		options := tt.mount.Options
		if len(options) == 0 {
			options = []string{"rbind"}
		}
		if m := p.Spec.Mounts[1]; m.Type != "bind" || m.Source != "/run/husk/x" || m.Destination != tt.mount.Destination || !slices.Equal(m.Options, options) {
			t.Errorf("%s: mount %+v", name, m)
		}
		got.mount, got.linux = nil, nil
		tt.want.Field, tt.want.Source = "mounts[1] ("+tt.mount.Destination+")", "/srv"
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}

func TestABindThatFollowsTheAgent(t *testing.T) {
	sp := base()
	sp.Mounts = []specs.Mount{{Destination: "/d", Type: "bind", Source: "/d", Options: []string{"rbind", "rprivate", "ro"}}}
	p, err := Transform(sp, "c1", true)
	if err != nil {
		t.Fatal(err)
	}
	p.Binds[0].At("/run/husk/d", true)
	if m := p.Spec.Mounts[0]; !slices.Equal(m.Options, []string{"rbind", "ro", "rslave"}) || p.Spec.Linux.RootfsPropagation != "rslave" {
		t.Errorf("mount %+v, propagation %q", m, p.Spec.Linux.RootfsPropagation)
	}
	if got := sp.Mounts[0].Options[1]; got != "rprivate" || sp.Linux.RootfsPropagation != "" {
		t.Error("the spec that was given has changed")
	}
}

func TestNothingPropagatesToTheHost(t *testing.T) {
	sp := base()
	sp.Mounts = []specs.Mount{{Destination: "/d", Type: "bind", Source: "/d", Options: []string{"rbind", "rshared"}}}
	sp.Linux.RootfsPropagation = "rshared"
	_, err := Transform(sp, "c1", true)
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "mounts[0] (/d).options: shared (Bidirectional)") {
		t.Errorf("%v", err)
	}
	sp.Mounts = nil
	if _, err = Transform(sp, "c1", true); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "linux.rootfsPropagation") {
		t.Errorf("%v", err)
	}
}
