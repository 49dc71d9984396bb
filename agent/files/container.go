package files

import (
	"fmt"
	"io"
	"os"
	"path"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/archive"
	"github.com/husk-containers/husk/internal/beneath"
	"github.com/husk-containers/husk/protocols/files"
)

// openRoot opens the root directory of a container, as its processes have it.
func (s *server) openRoot(id string) (int, error) {
	pid, err := s.containers.InitPID(id)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		// A pid is another's once its process has ended: it still is this one's.
		if _, err = s.containers.InitPID(id); err == nil {
			return fd, nil
		}
		unix.Close(fd)
		return -1, err
	}
	return -1, fmt.Errorf("open the container's root: %w: %w", err, errdefs.ErrFailedPrecondition)
}

// put extracts an archive. A symlink of the container's is followed on the way to
// the directory, as its processes follow it; below the directory one that leads out
// of it is refused, whether it was there or came with the archive.
func (s *server) put(r files.Request, body io.Reader) error {
	top, err := s.openRoot(r.Container)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	dir, err := beneath.OpenIn(top, r.Path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return archive.Failed("open", r.Path, err)
	}
	defer unix.Close(dir)
	root, err := os.OpenRoot(archive.Proc(dir))
	if err != nil {
		return archive.Failed("open", r.Path, err)
	}
	defer root.Close()
	return archive.Extract(root, body)
}

// get writes an archive of what is at a path in a container.
func (s *server) get(r files.Request, w io.Writer) error {
	top, err := s.openRoot(r.Container)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	dir, base, err := locate(top, r.Path)
	if err != nil {
		return archive.Failed("open", r.Path, err)
	}
	defer unix.Close(dir)
	name := path.Base(path.Clean(r.Path))
	if name == "/" {
		name = self
	}
	return archive.Write(w, dir, base, name)
}

// locate opens the directory that the last element of p is in. Where p ends with a
// slash, or with no name, it is the directory itself, and base is ".".
func locate(top int, p string) (dir int, base string, err error) {
	above, base := path.Split(p)
	if base == "" || base == "." || base == ".." {
		above, base = p, self
	}
	dir, err = beneath.OpenIn(top, above, unix.O_PATH|unix.O_DIRECTORY)
	return dir, base, err
}
