// Package version tells which build of Husk this is.
package version

import (
	"fmt"
	"runtime/debug"
)

// Set by the linker: -X github.com/husk-containers/husk/internal/version.version=v1.2.3
// and .commit=REVISION. Where they are empty, the toolchain's record speaks.
var version, commit string

// A Version names a build.
type Version struct {
	// Version is the release, such as "v1.2.3", or "devel".
	Version string `json:"version"`
	// Commit is the source's revision, with "-dirty" where it was changed, or
	// "unknown".
	Commit string `json:"commit"`
	// Go is the toolchain's version, such as "go1.26.8".
	Go string `json:"go"`
}

// Get returns the version of the running program.
func Get() Version {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		build = &debug.BuildInfo{}
	}
	return from(version, commit, build)
}

// String returns "VERSION COMMIT GO".
func (v Version) String() string {
	return fmt.Sprintf("%s %s %s", v.Version, v.Commit, v.Go)
}

func from(version, commit string, build *debug.BuildInfo) Version {
	v := Version{Version: version, Commit: commit, Go: build.GoVersion}
	if v.Version == "" && build.Main.Version != "(devel)" {
		v.Version = build.Main.Version
	}
	if v.Version == "" {
		v.Version = "devel"
	}
	if v.Commit == "" {
		v.Commit = revision(build.Settings)
	}
	return v
}

func revision(settings []debug.BuildSetting) string {
	rev, suffix := "unknown", ""
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision":
			rev = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			suffix = "-dirty"
		}
	}
	return rev + suffix
}
