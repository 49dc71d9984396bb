// Package modules finds kernel modules and what they depend on in a kernel's
// module directory, /lib/modules/RELEASE.
package modules

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// A Tree is the module directory of one kernel release.
type Tree struct {
	dir     string
	modules map[string]module   // by name
	builtin map[string]bool     // by name
	aliases map[string][]string // by name
}

// A module is a line of modules.dep.
type module struct {
	file string   // below the tree's directory
	deps []string // names
}

// Open reads the indexes modules.dep, modules.alias (it may lack) and
// modules.builtin that depmod and the kernel's build left in dir.
func Open(dir string) (*Tree, error) {
	t := &Tree{dir: dir, modules: map[string]module{}, builtin: map[string]bool{}, aliases: map[string][]string{}}
	err := eachLine(filepath.Join(dir, "modules.dep"), func(line string) error {
		file, deps, ok := strings.Cut(line, ":")
		if !ok || !filepath.IsLocal(file) {
			return fmt.Errorf("line %q is not of the form \"file: dependencies\"", line)
		}
		m := module{file: file}
		for _, dep := range strings.Fields(deps) {
			m.deps = append(m.deps, Name(dep))
		}
		t.modules[Name(file)] = m
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachLine(filepath.Join(dir, "modules.builtin"), func(line string) error {
		t.builtin[Name(line)] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachLine(filepath.Join(dir, "modules.alias"), func(line string) error {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" {
			t.aliases[f[2]] = append(t.aliases[f[2]], f[1])
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return t, nil
}

// Aliases returns the patterns by which the kernel asks for a module.
func (t *Tree) Aliases(name string) []string { return t.aliases[name] }

// Resolve returns the files of the named modules and of all they depend on, each
// once and after its dependencies: the order to load them in. Files are relative
// to the tree's directory. What is built into the kernel has no file. A module
// that is neither is errdefs.ErrNotFound. Soft dependencies are not followed.
func (t *Tree) Resolve(names ...string) ([]string, error) {
	var files []string
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		if seen[name] || t.builtin[name] {
			return nil
		}
		seen[name] = true
		m, ok := t.modules[name]
		if !ok {
			return fmt.Errorf("kernel module %s: neither built in nor in %s: choose a kernel that has it: %w", name, t.dir, errdefs.ErrNotFound)
		}
		// depmod lists the dependency to load first last.
		for _, dep := range slices.Backward(m.deps) {
			if err := visit(dep); err != nil {
				return fmt.Errorf("%s depends on %w", name, err)
			}
		}
		files = append(files, m.file)
		return nil
	}
	for _, name := range names {
		if err := visit(Name(name)); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// Read returns the module in file, as Resolve named it, decompressed.
func (t *Tree) Read(file string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(t.dir, file))
	if err != nil {
		return nil, fmt.Errorf("read kernel module: %w", err)
	}
	data, err = decompress(path.Ext(file), data)
	if err != nil {
		return nil, fmt.Errorf("decompress kernel module %s: %w", filepath.Join(t.dir, file), err)
	}
	return data, nil
}

// Name is the name of the module in file, as the kernel spells it: without
// directory and suffixes, and with "_" for "-".
func Name(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(name, "-", "_")
}

func eachLine(file string, do func(line string) error) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read module index: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		if err := do(lines.Text()); err != nil {
			return fmt.Errorf("read module index %s: %w", file, err)
		}
	}
	return nil
}
