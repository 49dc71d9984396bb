package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	// DefaultPath is read where nothing names another file.
	DefaultPath = "/etc/husk/configuration.toml"
	// EnvPath is the environment variable that names another file.
	EnvPath = "HUSK_CONFIG"

	dropInDir = "config.d" // beside the file
)

// Path chooses the file to load: option, which is ConfigPath of containerd's
// runtime options, before the environment's HUSK_CONFIG, before DefaultPath.
// explicit is whether one of the first two named it.
func Path(option string) (path string, explicit bool) {
	if option != "" {
		return option, true
	}
	if env := os.Getenv(EnvPath); env != "" {
		return env, true
	}
	return DefaultPath, false
}

// Load reads the file at path over the defaults, and over it each *.toml in
// config.d beside it in lexical order, key by key. A missing file is an error
// only if it was named explicitly. Errors are joined, all that are found at
// once: each is one line with file, line, key and what is allowed.
func Load(path string, explicit bool) (Config, error) {
	files, err := files(path, explicit)
	if err != nil {
		return Config{}, err
	}
	l := loader{config: Default(), rules: rules(), origin: make(map[string]string)}
	for _, f := range files {
		doc, err := os.ReadFile(f)
		if err != nil {
			return Config{}, fmt.Errorf("read configuration %q: %w", f, cause(err))
		}
		l.read(f, doc)
	}
	if err := l.finish(); err != nil {
		return Config{}, err
	}
	return l.config, nil
}

// files lists what to read, in order.
func files(path string, explicit bool) ([]string, error) {
	var files []string
	switch _, err := os.Stat(path); {
	case err == nil:
		files = append(files, path)
	case explicit || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read configuration %q: %w; write the file, or name another by %s or the runtime option ConfigPath",
			path, cause(err), EnvPath)
	}
	dir := filepath.Join(filepath.Dir(path), dropInDir)
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read configuration drop-ins %q: %w", dir, cause(err))
	}
	for _, e := range entries {
		if name := e.Name(); strings.HasSuffix(name, ".toml") && !strings.HasPrefix(name, ".") {
			files = append(files, filepath.Join(dir, name))
		}
	}
	return files, nil
}

// cause strips the operation and the path, which the caller names itself.
func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
