package version

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestFrom(t *testing.T) {
	vcs := func(modified string) []debug.BuildSetting {
		return []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: modified}}
	}
	for _, tt := range []struct {
		name, version, commit string
		build                 debug.BuildInfo
		want                  string
	}{
		{"linker", "v1.2.3", "def", debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: "v9"}, Settings: vcs("true")}, "v1.2.3 def go1.26"},
		{"module", "", "", debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: "v1.0.0"}}, "v1.0.0 unknown go1.26"},
		{"checkout", "", "", debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: "(devel)"}, Settings: vcs("false")}, "devel abc go1.26"},
		{"changed checkout", "", "", debug.BuildInfo{GoVersion: "go1.26", Settings: vcs("true")}, "devel abc-dirty go1.26"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := from(tt.version, tt.commit, &tt.build).String(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestGet(t *testing.T) {
	v := Get()
	if v.Go != runtime.Version() || v.Version == "" || v.Commit == "" {
		t.Errorf("got %+v", v)
	}
}
