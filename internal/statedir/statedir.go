// Package statedir is the layout of the directory in which sandboxes keep their files:
// one directory each, and in it the address of the shim.
package statedir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
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

// A Shim serves a sandbox.
type Shim struct {
	Namespace, Sandbox string
	// Dir is the sandbox's directory.
	Dir string
	// Address is the path of the shim's socket; empty while the sandbox begins or ends.
	Address string
}

// Shims lists those of a namespace's sandboxes that have an address.
func Shims(dir, namespace string) ([]Shim, error) {
	all, err := All(dir)
	return slices.DeleteFunc(all, func(s Shim) bool { return s.Namespace != namespace || s.Address == "" }), err
}

// All lists the shims of every sandbox, in order of namespaces and ids.
func All(dir string) ([]Shim, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var shims []Shim
	for _, e := range entries {
		namespace, id, ours := strings.Cut(e.Name(), "+")
		if !ours {
			continue
		}
		s := Shim{Namespace: namespace, Sandbox: id, Dir: filepath.Join(dir, e.Name())}
		address, err := os.ReadFile(filepath.Join(s.Dir, addressFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list sandboxes: %w", err)
		}
		s.Address = string(address)
		shims = append(shims, s)
	}
	return shims, nil
}

// Find returns the one sandbox whose id is id, or begins with it, of a namespace; empty:
// of all. Its error names the others that it could be.
func Find(dir, namespace, id string) (Shim, error) {
	all, err := All(dir)
	if err != nil {
		return Shim{}, err
	}
	var whole, begin, elsewhere []Shim
	for _, s := range all {
		switch {
		case id == "" || !strings.HasPrefix(s.Sandbox, id):
		case namespace != "" && s.Namespace != namespace:
			elsewhere = append(elsewhere, s)
		case s.Sandbox == id:
			whole = append(whole, s)
		default:
			begin = append(begin, s)
		}
	}
	if len(whole) == 0 {
		whole = begin
	}
	where := "in any namespace"
	if namespace != "" {
		where = fmt.Sprintf("in namespace %q", namespace)
	}
	switch {
	case len(whole) == 1:
		return whole[0], nil
	case len(whole) > 1:
		return Shim{}, fmt.Errorf("pod %q could be each of %s: give more of its id, or its namespace by -n: %w", id, names(whole), errdefs.ErrInvalidArgument)
	case len(elsewhere) > 0:
		return Shim{}, fmt.Errorf("no pod %q %s, but %s: give its namespace by -n: %w", id, where, names(elsewhere), errdefs.ErrNotFound)
	}
	return Shim{}, fmt.Errorf("no pod %q %s, of %d in %s: husk status lists them: %w", id, where, len(all), dir, errdefs.ErrNotFound)
}

func names(shims []Shim) string {
	var all []string
	for _, s := range shims {
		all = append(all, s.Namespace+"/"+s.Sandbox)
	}
	return strings.Join(all, ", ")
}
