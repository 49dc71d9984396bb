package e2e

import (
	"strings"
	"testing"
)

// A pod that its operator pauses stands still, says so, and goes on.
func TestHuskPauseAndReclaim(t *testing.T) {
	eachHusk(t, func(e *env) {
		id := e.detached("operated", "sleep 1000")
		does := func(want string, command string) {
			e.Helper()
			if r := e.husk(command, id); r.code != 0 || !strings.HasPrefix(r.stdout, e.d.Token+"/"+id+" "+want) {
				e.Errorf("husk %s: %v", command, r)
			}
		}
		if p := e.status(id); p.State != "running" || len(p.VCPUs) != 1 || p.VCPUs[0].CPUs == "" {
			e.Errorf("before: %+v", p)
		}
		does("is paused", "pause")
		if p := e.status(id); p.State != "paused" || len(p.VCPUs) != 1 {
			e.Errorf("paused: %+v", p)
		}
		if r := e.exec(id, "in-pause", "true"); r.code == 0 || !strings.Contains(r.stderr, "paused") {
			e.Errorf("exec in a sandbox that is paused: %v", r)
		}
		for command, want := range map[string]string{"pause": "paused, not running", "reclaim": "resume it first"} {
			if r := e.husk(command, id); r.code != 1 || !strings.Contains(r.stderr, want) {
				e.Errorf("husk %s of a sandbox that is paused: %v", command, r)
			}
		}
		does("runs", "resume")
		e.says(id, "goes-on", "echo on", "on\n")
		does("holds ", "reclaim")
		e.says(id, "reclaimed", "echo on", "on\n")
	})
}
