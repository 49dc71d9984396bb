package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// verify checks what writers have left, and prints how much it is.
func verify(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, manifest+"*"))
	if err != nil {
		return err
	}
	names, counted, logged, files := []string{slots}, map[string]int{}, map[string]int{}, 0
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var w writer
		if err := json.Unmarshal(data, &w); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		name := strings.TrimPrefix(filepath.Base(path), manifest)
		group, _, _ := strings.Cut(name, "-")
		names = append(names, filepath.Base(path), name)
		counted[group] += w.Counted
		logged[name] = w.Logged
		files += len(w.Left)
		if err := w.verify(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for group, want := range counted {
		names = append(names, counter+group)
		data, err := os.ReadFile(filepath.Join(dir, counter+group))
		if err != nil {
			return err
		}
		if got := number(string(data)); got != want {
			return fmt.Errorf("group %s has counted to %d, want %d", group, got, want)
		}
	}
	if err := verifyLog(filepath.Join(dir, logFile), logged); err != nil {
		return err
	}
	names = append(names, logFile)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains(names, e.Name()) {
			return fmt.Errorf("%s is left", e.Name())
		}
	}
	records, err := os.ReadDir(filepath.Join(dir, slots))
	for _, e := range records {
		err = errors.Join(err, checkRecord(filepath.Join(dir, slots, e.Name())))
	}
	fmt.Printf("%d writers left %d files\n", len(paths), files)
	return err
}

// verify checks a writer's own directory.
func (w *writer) verify(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) != len(w.Left) {
		return fmt.Errorf("%s has %d files, want %d", dir, len(entries), len(w.Left))
	}
	for name, want := range w.Left {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return err
		}
		if got := (leftover{len(data), int(st.Nlink), try.Digest(data)}); got != want {
			return fmt.Errorf("%s is %+v, want %+v", path, got, want)
		}
	}
	return nil
}

// verifyLog wants each writer's lines, in its order.
func verifyLog(path string, want map[string]int) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	got := map[string]int{}
	for line := range strings.Lines(string(data)) {
		name, n, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if n != strconv.Itoa(got[name]) {
			return fmt.Errorf("%s has line %q after %d of this writer", path, line, got[name])
		}
		got[name]++
	}
	if !maps.Equal(got, want) {
		return fmt.Errorf("%s has lines %v, want %v", path, got, want)
	}
	return nil
}

// number in the counter's file; of an empty one 0.
func number(text string) int {
	n, _ := strconv.Atoi(text)
	return n
}
