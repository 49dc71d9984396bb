package main

import (
	"bytes"
	"encoding/json"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/husk-containers/husk/test/bench/message"
)

func TestEachTreeHasItsPhasesAndLeavesNothing(t *testing.T) {
	for name, want := range map[string][]string{
		"small":   {"create", "stat", "unlink"},
		"clone":   {"write", "read", "remove"},
		"install": {"write", "list", "remove"},
	} {
		dir := t.TempDir()
		var out bytes.Buffer
		if err := run([]string{name, dir, "50"}, nil, &out); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var p Phases
		if err := json.Unmarshal(out.Bytes(), &p); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, phase := range p.Phases {
			names = append(names, phase.Name)
			if phase.Took <= 0 {
				t.Errorf("%s: %s took %v", name, phase.Name, phase.Took)
			}
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s has the phases %v, want %v", name, names, want)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s left %v, %v", name, left, err)
		}
	}
}

func TestAnInstalledTreeIsDeepLinkedAndExecutable(t *testing.T) {
	dir := t.TempDir()
	const packages = 9
	if err := newWriter().install(dir, packages); err != nil {
		t.Fatal(err)
	}
	files, links, deepest := 0, 0, 0
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		deepest = max(deepest, strings.Count(strings.TrimPrefix(path, dir), "/"))
		switch {
		case d.Type().IsRegular():
			files++
		case d.Type() == fs.ModeSymlink:
			links++
			info, err := os.Stat(path) // what it leads to
			if err != nil || info.Mode() != 0o755 {
				t.Errorf("%s leads to %v, %v; want a program", path, info, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if files != packages*filesPerPackage || links != packages || deepest < 8 {
		t.Errorf("%d files, %d links, %d levels", files, links, deepest)
	}
}

func TestATreeThatLostAFileIsAnError(t *testing.T) {
	dir, w := t.TempDir(), newWriter()
	for _, name := range []string{"a", "b"} {
		if err := w.write(filepath.Join(dir, name), 100_000); err != nil {
			t.Fatal(err)
		}
	}
	look := map[string]func(string) error{"read": w.read, "list": w.list}
	for name, f := range look {
		if err := f(dir); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, "b"), 99_999); err != nil {
		t.Fatal(err)
	}
	for name, f := range look {
		if err := f(dir); err == nil {
			t.Errorf("%s takes a tree with a byte less", name)
		}
	}
}

func TestSizesAreMostlySmall(t *testing.T) {
	w, below := newWriter(), 0
	for range 1000 {
		size := w.size()
		if size < 1 || size >= 64<<10 {
			t.Fatalf("a file of %d bytes", size)
		}
		if size < 2<<10 {
			below++
		}
	}
	if below < 400 || below > 600 {
		t.Errorf("%d of 1000 are below 2 KiB, want about half", below)
	}
}

func TestTalk(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- message.Serve(l) }()
	var out bytes.Buffer
	if err := run([]string{"talk", socket, "8", "5", "10ms"}, nil, &out); err != nil {
		t.Error(err)
	}
	l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	var got Talk
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || len(got.Times) != 5 || got.Stream.Bytes == 0 {
		t.Errorf("talk: %+v, %v", got, err)
	}
}

// Each kind of change is made when the watcher says that it is ready.
func TestWatchSeesTheChange(t *testing.T) {
	for kind, change := range map[string]func(name string) error{
		"appear": func(name string) error { return os.WriteFile(name, nil, 0o644) },
		"reopen": func(name string) error { return os.WriteFile(name, []byte("old"+changed), 0o644) },
		"follow": func(name string) error {
			f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString(changed)
			return err
		},
	} {
		name := filepath.Join(t.TempDir(), "file")
		if kind != "appear" {
			if err := os.WriteFile(name, []byte("old"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		var said []string
		err := run([]string{"watch", kind, name}, nil, writerFunc(func(line string) error {
			said = append(said, line)
			if line == "ready" {
				return change(name)
			}
			return nil
		}))
		if err != nil || !slices.Equal(said, []string{"ready", "seen"}) {
			t.Errorf("%s: said %v, %v", kind, said, err)
		}
	}
}

// writerFunc is called with each line that is written.
type writerFunc func(line string) error

func (f writerFunc) Write(p []byte) (int, error) {
	return len(p), f(strings.TrimSuffix(string(p), "\n"))
}

func TestWatchOfWhatHasChangedIsAnError(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	for kind := range sights {
		if err := run([]string{"watch", kind, name}, nil, io.Discard); err == nil {
			t.Errorf("%s: no error", kind)
		}
	}
}

func TestHold(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	r, w := io.Pipe()
	var got []byte
	err := run([]string{"hold", name}, r, writerFunc(func(string) (err error) {
		got, err = os.ReadFile(name)
		w.Close()
		return err
	}))
	if err != nil || string(got) != changed {
		t.Errorf("hold: %q, %v", got, err)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"small", "/x"}, {"clone", "/x", "0"}, {"install", "/x", "many"}, {"watch", "birds", "/x"}, {"talk", "/x", "8", "1"}, {"talk", "/x", "8", "1", "long"}, {"hold"}} {
		if err := run(args, strings.NewReader(""), io.Discard); err == nil {
			t.Errorf("load %v: no error", args)
		}
	}
}
