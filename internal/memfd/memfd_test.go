package memfd

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Memory outlives the process that made it, here its descriptors, and is held once.
func TestKeep(t *testing.T) {
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		t.Skipf("no memfd: %v", err)
	}
	own := os.NewFile(uintptr(fd), "memory")
	other, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other) //nolint:errcheck // of a test
	if _, err := own.WriteString("kept"); err != nil {
		t.Fatal(err)
	}
	held := Keep(os.Getpid())
	if err := own.Close(); err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, f := range held {
		b := make([]byte, 4)
		if _, err := f.ReadAt(b, 0); err == nil && string(b) == "kept" {
			kept++
		}
	}
	if kept != 1 {
		t.Errorf("%d of %d files are the memory, want 1", kept, len(held))
	}
	Free(held)
	if held := Keep(1 << 30); held != nil { // no such process
		t.Errorf("held %d files of nobody", len(held))
	}
}
