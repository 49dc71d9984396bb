// Package podfiles makes the system files that the containers of a pod see alike, for
// a pod whose engine leaves that to the runtime: it does so where there is no sandbox
// container to make them for.
package podfiles

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/virtcontainers/spec"
)

// Files are the system files of a pod; a nil one has none.
type Files struct{ dir string }

// Make writes them to dir, which it makes: the hosts file of the host, the pod's host
// name, and resolvConf or, where that is nil, the host's.
func Make(dir, hostname string, resolvConf *string) (*Files, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the pod's files: %w", err)
	}
	for _, path := range spec.SystemFiles {
		content, err := os.ReadFile(path)
		switch {
		case path == "/etc/hostname":
			content = []byte(hostname + "\n")
		case path == "/etc/resolv.conf" && resolvConf != nil:
			content = []byte(*resolvConf)
		case err != nil && !errors.Is(err, fs.ErrNotExist): // a host without one has none to give
			return nil, fmt.Errorf("make the pod's files: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), content, 0o644); err != nil {
			return nil, fmt.Errorf("make the pod's files: %w", err)
		}
	}
	return &Files{dir: dir}, nil
}

// AddTo mounts the files where the spec has nothing else.
func (f *Files) AddTo(sp *specs.Spec) {
	if f == nil {
		return
	}
	for _, path := range spec.SystemFiles {
		if slices.ContainsFunc(sp.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == path }) {
			continue
		}
		mode := "rw"
		if sp.Root != nil && sp.Root.Readonly {
			mode = "ro"
		}
		sp.Mounts = append(sp.Mounts, specs.Mount{
			Destination: path, Type: "bind", Source: filepath.Join(f.dir, filepath.Base(path)), Options: []string{"rbind", mode},
		})
	}
}
