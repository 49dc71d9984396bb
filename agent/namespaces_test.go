package agent_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func TestNamespacePaths(t *testing.T) {
	g := newGuest(t)
	g.start("target", g.open(false, true), "sleep", "1000")
	for _, tc := range []struct {
		ns specs.LinuxNamespace
		ok bool
	}{
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.SharedPID}, true},
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.ContainerPID("target")}, true},
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.ContainerPID("..")}, false},
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.ContainerPID("target") + "/"}, false},
		{specs.LinuxNamespace{Type: specs.IPCNamespace, Path: agentv1.ContainerPID("target")}, false},
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: "/proc/1/ns/pid"}, false},
		{specs.LinuxNamespace{Type: specs.PIDNamespace, Path: agentv1.SharedPID + "/"}, false},
		{specs.LinuxNamespace{Type: specs.IPCNamespace, Path: agentv1.SharedPID}, false},
		{specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/run/netns/a"}, false},
	} {
		g.namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, tc.ns}
		err := g.create("c", g.open(false, false), "true")
		if tc.ok {
			if err != nil {
				t.Error(err)
			} else if err := g.remove("c", ""); err != nil {
				t.Error(err)
			}
		} else if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("%s has the path %q", tc.ns.Type, tc.ns.Path)) {
			t.Errorf("%v: %v", tc.ns, err)
		}
	}
}

func TestNoContainerJoinsOneThatHasEnded(t *testing.T) {
	g := newGuest(t)
	g.start("target", g.open(false, true), "true")
	g.wait("target", "")
	for _, id := range []string{"target", "c", "nosuch"} { // an ended one, itself, none
		g.namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: agentv1.ContainerPID(id)}}
		err := g.create("c", g.open(false, false), "true")
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), fmt.Sprintf("PID namespace of container %q", id)) {
			t.Errorf("the PID namespace of %s: %v", id, err)
		}
	}
	g.namespaces = nil
	if err := g.create("c", g.open(false, false), "true"); err != nil { // nothing of it was left
		t.Error(err)
	}
}

// TestContainerEndsWithItsFirstProcess holds that what is left of a container
// without a PID namespace of its own is killed. Of one that has one the kernel
// has killed all, though not in this package's runtime.
func TestContainerEndsWithItsFirstProcess(t *testing.T) {
	for name, tc := range map[string]struct {
		namespaces []specs.LinuxNamespace
		killed     bool
	}{
		"own":    {[]specs.LinuxNamespace{{Type: specs.PIDNamespace}}, false},
		"shared": {[]specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: agentv1.SharedPID}}, true},
		"target": {[]specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: agentv1.ContainerPID("sibling")}}, true},
		"guest":  {nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			g.start("sibling", g.open(false, true), "sleep", "1000")
			g.namespaces = tc.namespaces
			s := g.open(false, false)
			g.start("c", s, "sh", "-c", "sleep 1000 & read a; exit 3")
			if err := g.exec("c", "e", g.open(false, true), "sleep", "1000"); err != nil {
				t.Fatal(err)
			}
			s.stdin.CloseWrite()
			if exit := g.wait("c", ""); exit.GetExitStatus() != 3 {
				t.Errorf("exit %v", exit)
			}
			if tc.killed {
				s.eof() // the background process had the streams
				if exit := g.wait("c", "e"); exit.GetExitStatus() != 137 {
					t.Errorf("exit of the exec %v", exit)
				}
			} else if pids, err := g.runtime.Pids(g.ctx, "c"); len(pids) != 2 || err != nil {
				t.Errorf("processes %v, %v", pids, err)
			}
			if pids, err := g.runtime.Pids(g.ctx, "sibling"); len(pids) != 1 || err != nil {
				t.Errorf("processes of the sibling %v, %v", pids, err)
			}
		})
	}
}
