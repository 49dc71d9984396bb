package virtiofs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// FindPreload returns the library to preload into a virtiofsd of C, made of
// preload/open.c, where it is installed: in ../lib/husk beside the directory of this
// process's program. Without it a guest can end its virtiofsd, and with it itself, by
// creating a file that the host creates at the same moment. The error tells so, and
// the remedy.
func FindPreload() (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	return findPreload(program)
}

func findPreload(program string) (string, error) {
	path := filepath.Join(filepath.Dir(program), "../lib/husk/virtiofsd-preload.so")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("preload into virtiofsd: %w: a pod that creates a file at the moment when the host creates it may end: run make guest and make install of Husk, or use virtiofsd 1.5 or later", err)
	}
	if strings.ContainsAny(path, ": ") {
		return "", fmt.Errorf("preload %q into virtiofsd: the dynamic linker takes no path with a colon or a space: install Husk elsewhere: %w", path, errdefs.ErrInvalidArgument)
	}
	return path, nil
}
