// Package modindex is the list of kernel modules that a guest loads when they are
// asked for: guest/mkinitrd writes it, the agent reads it.
package modindex

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// The names of the files in the directory of the modules.
const (
	// File is the list.
	File = "index"
	// Suffix is that of a module's file, after its name: it is compressed by gzip.
	Suffix = ".ko.gz"
)

// A Module is one of the list.
type Module struct {
	Name string
	// Needs are the modules of the list to load before, in that order.
	Needs []string
	// Aliases are the patterns of what the kernel asks for when it needs the module.
	Aliases []string
}

// An Index is the list.
type Index []Module

// Write writes a line for each module: its name, its needs, its aliases.
func (x Index) Write(w io.Writer) error {
	var b bytes.Buffer
	for _, m := range x {
		fmt.Fprintf(&b, "%s %s, %s\n", m.Name, strings.Join(m.Needs, ","), strings.Join(m.Aliases, " "))
	}
	_, err := w.Write(b.Bytes())
	return err
}

// Read reads what Write has written.
func Read(r io.Reader) (Index, error) {
	var x Index
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			return nil, fmt.Errorf("read index of modules: line %d has %d fields", len(x)+1, len(fields))
		}
		needs := strings.FieldsFunc(fields[1], func(r rune) bool { return r == ',' })
		x = append(x, Module{Name: fields[0], Needs: needs, Aliases: fields[2:]})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read index of modules: %w", err)
	}
	return x, nil
}

// Resolve returns the modules that a request is for, by name or alias, and before
// each those that it needs. "-" and "_" are the same, as for modprobe.
func (x Index) Resolve(request string) []string {
	request = fold(request)
	var names []string
	for _, m := range x {
		if m.Name == request || slices.ContainsFunc(m.Aliases, func(alias string) bool {
			ok, err := path.Match(fold(alias), request)
			return err == nil && ok
		}) {
			names = append(names, m.Needs...)
			names = append(names, m.Name)
		}
	}
	return names
}

func fold(s string) string { return strings.ReplaceAll(s, "-", "_") }
