package cp

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// An endpoint is one side of a copy.
type endpoint struct {
	container string // empty: the host
	path      string
}

// stream tells whether a side is a tar on standard input or output.
func (e endpoint) stream() bool { return e.container == "" && e.path == "-" }

// parse reads CONTAINER:PATH, PATH or -. A path of the host that has a colon is told
// from the first by beginning with / or a dot.
func parse(arg string) (endpoint, error) {
	container, p, ok := strings.Cut(arg, ":")
	switch {
	case arg == "":
		return endpoint{}, fmt.Errorf("an empty path: %w", errdefs.ErrInvalidArgument)
	case !ok || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, "."):
		return endpoint{path: arg}, nil
	case container == "" || p == "":
		return endpoint{}, fmt.Errorf("%q is not CONTAINER:PATH: %w", arg, errdefs.ErrInvalidArgument)
	}
	return endpoint{container: container, path: p}, nil
}

// absolute is a path in a container, from its root, without a slash at its end.
func absolute(p string) string { return path.Clean("/" + p) }

// contents tells whether of a directory that is copied what is in it is meant, as by dir/.
func contents(p string) bool {
	return p == "." || strings.HasSuffix(p, "/.") || path.Clean("/"+p) == "/"
}

// asDirectory tells whether a destination is named as a directory, as by dir/.
func asDirectory(p string) bool {
	return strings.HasSuffix(p, "/") || p == "." || p == ".." || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")
}
