package e2e

import (
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// settings are tables and keys of configuration.toml.
type settings map[string]map[string]any

// config is a configuration file for this repository's build, with its state
// below the test's scratch directory, changed by over.
func (e *env) config(over settings) []byte {
	e.Helper()
	merged := settings{
		"runtime": {
			"state_dir":    filepath.Join(e.d.Dir, "husk"),
			"boot_timeout": "2m", // several guests boot at once, on few cores, without KVM
		},
		"guest": {
			"kernel": filepath.Join(e.root, "build", "guest", "vmlinuz"),
			"initrd": filepath.Join(e.root, "build", "guest", "initrd.img"),
		},
	}
	for table, keys := range over {
		if merged[table] == nil {
			merged[table] = map[string]any{}
		}
		for key, value := range keys {
			merged[table][key] = value
		}
	}
	data, err := toml.Marshal(merged)
	if err != nil {
		e.Fatal(err)
	}
	return data
}
