package virtcontainers

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// systemFiles are those that every container of a pod sees alike.
var systemFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// makeFiles writes a pod's system files, where its engine leaves that to the
// runtime: it does so where there is no sandbox container to make them for.
func (s *Sandbox) makeFiles(resolvConf *string) error {
	dir := filepath.Join(s.dir, "etc")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make the pod's files: %w", err)
	}
	for _, path := range systemFiles {
		content, err := os.ReadFile(path)
		switch {
		case path == "/etc/hostname":
			content = []byte(s.hostname + "\n")
		case path == "/etc/resolv.conf" && resolvConf != nil:
			content = []byte(*resolvConf)
		case err != nil && !errors.Is(err, fs.ErrNotExist): // a host without one has none to give
			return fmt.Errorf("make the pod's files: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), content, 0o644); err != nil {
			return fmt.Errorf("make the pod's files: %w", err)
		}
	}
	s.files = dir
	return nil
}

// addFiles mounts the pod's files where the spec has nothing else.
func (s *Sandbox) addFiles(sp *specs.Spec) {
	if s.files == "" {
		return
	}
	for _, path := range systemFiles {
		if slices.ContainsFunc(sp.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == path }) {
			continue
		}
		mode := "rw"
		if sp.Root != nil && sp.Root.Readonly {
			mode = "ro"
		}
		sp.Mounts = append(sp.Mounts, specs.Mount{
			Destination: path, Type: "bind", Source: filepath.Join(s.files, filepath.Base(path)), Options: []string{"rbind", mode},
		})
	}
}
