// Package module loads kernel modules when they are asked for.
package module

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/modindex"
)

const (
	// Dir holds the modules that a guest may come to need, and their index.
	Dir = "/modules"
	// Helper is what the kernel calls when it needs a module for what a process has
	// asked of it. The agent's program is there, and then calls Main.
	Helper = "/sbin/modprobe"

	maxSize = 16 << 20 // of a module, uncompressed
)

// Main is the whole life of the kernel's helper, with the arguments that the kernel
// gives: -q -- and what it needs, such as fs-overlay. The process that has asked
// waits for it. It has no standard streams: what is wrong goes to the kernel's log.
func Main(args []string) error {
	if len(args) == 0 {
		return errors.New("no module is named")
	}
	err := Load(Dir, args[len(args)-1])
	if err != nil && !errdefs.IsNotFound(err) { // the kernel asks for much that there is nowhere
		os.WriteFile("/dev/kmsg", []byte("<4>husk-agent: "+err.Error()+"\n"), 0) //nolint:errcheck // there is nobody else to tell
	}
	return err
}

// Load loads the modules in dir that a request is for: a module's name, or an alias
// that the kernel uses, such as char-major-10-200. What is loaded already stays.
// NotFound where there is no such module.
func Load(dir, request string) error {
	names, err := find(dir, request)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("kernel module for %q: none in the guest's image: %w", request, errdefs.ErrNotFound)
	}
	for _, name := range names {
		image, err := read(filepath.Join(dir, name+modindex.Suffix))
		if err == nil {
			err = unix.InitModule(image, "")
		}
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load kernel module %s for %q: %w", name, request, err)
		}
	}
	return nil
}

// find returns the modules to load, in their order.
func find(dir, request string) ([]string, error) {
	f, err := os.Open(filepath.Join(dir, modindex.File))
	if errors.Is(err, fs.ErrNotExist) { // an image without
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	index, err := modindex.Read(f)
	if err != nil {
		return nil, err
	}
	return index.Resolve(request), nil
}

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	image, err := io.ReadAll(io.LimitReader(z, maxSize))
	if err != nil {
		return nil, fmt.Errorf("decompress %s: %w", file, err)
	}
	return image, nil
}
