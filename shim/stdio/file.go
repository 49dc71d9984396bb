package stdio

import (
	"io"
	"os"
	"path/filepath"
)

// openFile opens a log file, making it with create. Two streams may name the same
// one: each write is appended whole.
func openFile(path string, create bool) (io.WriteCloser, error) {
	flags := os.O_WRONLY | os.O_APPEND
	if create {
		flags |= os.O_CREATE
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return nil, err
	}
	return newOutput(f, f), nil
}
