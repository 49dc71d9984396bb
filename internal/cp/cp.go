// Package cp copies files between the host and a container, by the container's shim.
package cp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/internal/archive"
)

// Options say where containers are, and what is done with -.
type Options struct {
	// StateDir is the configuration's runtime.state_dir; Namespace is containerd's.
	StateDir, Namespace string
	// Limits bound what comes out of a container.
	Limits archive.Limits
	Stdin  io.Reader
	Stdout io.Writer
}

// presence is what is at a path, symbolic links followed.
type presence int

const (
	missing presence = iota
	isFile
	isDirectory
)

// Copy copies from source to destination. One of them is CONTAINER:PATH, the other a path
// of the host, or - for a tar on standard input or output. Names are as cp(1) has them,
// but that dir/. means what is in dir.
func Copy(ctx context.Context, o Options, source, destination string) error {
	from, err := parse(source)
	if err != nil {
		return err
	}
	to, err := parse(destination)
	if err != nil {
		return err
	}
	switch {
	case from.container == "" && to.container == "":
		return fmt.Errorf("neither %q nor %q is CONTAINER:PATH: %w", source, destination, errdefs.ErrInvalidArgument)
	case from.container != "" && to.container != "":
		return fmt.Errorf("both are in containers: copy by way of the host, or of -: %w", errdefs.ErrInvalidArgument)
	}
	r, err := find(ctx, o.StateDir, o.Namespace, from.container+to.container) // one is empty
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // the answer is there
	if to.container != "" {
		err = o.copyIn(ctx, r, from, to.path)
	} else {
		err = o.copyOut(ctx, r, from.path, to)
	}
	if errdefs.IsResourceExhausted(err) {
		err = fmt.Errorf("%w; -max-entries and -max-bytes allow more", err)
	}
	return err
}

func (o Options) copyIn(ctx context.Context, r *remote, from endpoint, destination string) error {
	if from.stream() {
		return r.in(ctx, absolute(destination), func(w io.Writer) error {
			_, err := io.Copy(w, o.Stdin)
			return err
		})
	}
	info, err := os.Lstat(from.path) // with a slash at its end it follows a link
	if err != nil {
		return err
	}
	source, err := filepath.Abs(from.path)
	if err != nil {
		return err
	}
	place, is, err := r.stat(ctx, absolute(destination))
	if err != nil {
		return err
	}
	dir, name := path.Dir(place), path.Base(place)
	switch {
	case is == isDirectory && info.IsDir() && contents(from.path):
		dir, name = place, "."
	case is == isDirectory:
		dir, name = place, filepath.Base(source)
	case is == isFile && (info.IsDir() || asDirectory(destination)):
		return fmt.Errorf("%s in the container is not a directory: %w", place, errdefs.ErrInvalidArgument)
	case is == missing && !info.IsDir() && asDirectory(destination):
		return fmt.Errorf("directory %s does not exist in the container: make it first, or leave out the slash for a file of that name: %w", place, errdefs.ErrNotFound)
	case is == missing:
		_, above, err := r.stat(ctx, dir)
		if err == nil && above != isDirectory {
			err = fmt.Errorf("directory %s does not exist in the container: make it first: %w", dir, errdefs.ErrNotFound)
		}
		if err != nil {
			return err
		}
	}
	if asDirectory(from.path) {
		if source, err = filepath.EvalSymlinks(source); err != nil {
			return err
		}
	}
	return r.in(ctx, dir, func(w io.Writer) error { return archive.Write(w, source, name) })
}

func (o Options) copyOut(ctx context.Context, r *remote, source string, to endpoint) error {
	from := absolute(source)
	if contents(source) {
		// It is a directory, and may be named by a link to one.
		place, is, err := r.stat(ctx, from)
		switch {
		case err != nil:
			return err
		case is == missing:
			return fmt.Errorf("%s does not exist in the container: %w", from, errdefs.ErrNotFound)
		case is == isFile:
			return fmt.Errorf("%s in the container is not a directory: %w", from, errdefs.ErrInvalidArgument)
		}
		from = place
	}
	if to.stream() {
		if isTerminal(o.Stdout) {
			return fmt.Errorf("standard output is a terminal, which cannot take a tar: redirect it, or name a file: %w", errdefs.ErrInvalidArgument)
		}
		return r.out(ctx, from, false, func(tar io.Reader) error {
			_, err := io.Copy(o.Stdout, tar)
			return err
		})
	}
	target, err := place(to.path, path.Base(from), contents(source))
	if err != nil {
		return err
	}
	return r.out(ctx, from, false, func(tar io.Reader) error { return archive.Extract(tar, target, o.Limits) })
}

// place is where on the host goes what is called base in the container.
func place(destination, base string, contents bool) (archive.Target, error) {
	info, err := os.Stat(destination)
	switch {
	case err == nil && info.IsDir() && contents:
		return archive.Target{Dir: destination, Name: ".", Want: archive.Directory}, nil
	case err == nil && info.IsDir():
		return archive.Target{Dir: destination, Name: base}, nil
	case err == nil:
		// The file itself is replaced, not a link to it.
		real, err := filepath.EvalSymlinks(destination)
		return archive.Target{Dir: filepath.Dir(real), Name: filepath.Base(real), Want: archive.NoDirectory}, err
	case !errors.Is(err, fs.ErrNotExist):
		return archive.Target{}, err
	}
	target := archive.Target{Dir: filepath.Dir(filepath.Clean(destination)), Name: filepath.Base(destination)}
	if contents || asDirectory(destination) {
		target.Want = archive.Directory
	}
	if _, err := os.Stat(target.Dir); err != nil {
		return target, err
	}
	return target, nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
