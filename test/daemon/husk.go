package daemon

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
)

// Settings are tables and keys of Husk's configuration.toml.
type Settings map[string]map[string]any

// Settings is a configuration for what the repository's build holds, with its
// state below the daemon's directory, changed by over.
func (d *Daemon) Settings(over Settings) ([]byte, error) {
	guest := filepath.Join(d.cfg.Root, "build", "guest")
	merged := Settings{
		"runtime": {
			"state_dir":    d.file("husk"),
			"boot_timeout": "2m", // several guests boot at once, on few cores, without KVM
		},
		"guest": {
			"kernel": filepath.Join(guest, "vmlinuz"),
			"initrd": filepath.Join(guest, "initrd.img"),
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
		return nil, fmt.Errorf("encode Husk's configuration: %w", err)
	}
	return data, nil
}

// Configure gives the shims that start from now on Settings(over).
func (d *Daemon) Configure(over Settings) error {
	data, err := d.Settings(over)
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.huskConfig(), data, 0o600); err != nil {
		return fmt.Errorf("write Husk's configuration: %w", err)
	}
	return nil
}

func (d *Daemon) huskConfig() string { return d.file("configuration.toml") }
