package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/husk-containers/husk/internal/child"
)

func TestProcesses(t *testing.T) {
	bundle, dir := t.TempDir(), t.TempDir()
	r := New(bundle, dir)
	if err := r.Add("shim", os.Getpid()); err != nil {
		t.Fatal(err)
	}
	start, err := child.StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	want := []Process{{"shim", os.Getpid(), start}}
	if got, err := Processes(bundle); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if err := r.Leave(); err != nil {
		t.Fatal(err)
	}
	if got, err := Processes(dir); err != nil || !slices.Equal(got, want) {
		t.Errorf("after Leave: got %v, %v; want %v", got, err, want)
	}
	if _, err := Processes(bundle); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a bundle without a record: %v", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, fileName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Processes(bundle); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of garbage: %v", err)
	}
}
