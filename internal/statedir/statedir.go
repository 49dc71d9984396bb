// Package statedir is the layout of the directory in which sandboxes keep their files:
// one directory each, and in it the address of the shim.
package statedir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// addressFile is in a sandbox's directory.
const addressFile = "address"

// Sandbox is the directory of a sandbox. '+' occurs neither in namespaces nor in ids, so
// no two sandboxes share one.
func Sandbox(dir, namespace, id string) string { return filepath.Join(dir, namespace+"+"+id) }

// SetAddress leaves in a sandbox's directory the path of the socket on which its shim
// serves.
func SetAddress(sandbox, address string) error {
	if err := os.WriteFile(filepath.Join(sandbox, addressFile), []byte(address), 0o600); err != nil {
		return fmt.Errorf("leave the shim's address: %w", err)
	}
	return nil
}

// A Shim serves the sandbox of that id at the socket of that path.
type Shim struct{ Sandbox, Address string }

// Shims lists those of a namespace's sandboxes.
func Shims(dir, namespace string) ([]Shim, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var shims []Shim
	for _, e := range entries {
		id, ours := strings.CutPrefix(e.Name(), namespace+"+")
		if !ours {
			continue
		}
		address, err := os.ReadFile(filepath.Join(dir, e.Name(), addressFile))
		switch {
		case errors.Is(err, fs.ErrNotExist) || err == nil && len(address) == 0: // it begins or ends just now
		case err != nil:
			return nil, fmt.Errorf("list sandboxes: %w", err)
		default:
			shims = append(shims, Shim{Sandbox: id, Address: string(address)})
		}
	}
	return shims, nil
}
