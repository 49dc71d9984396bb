package virtcontainers

import (
	"context"
	"io"
	"net"

	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/virtcontainers/refusal"
)

// CopyIn extracts a tar archive into the directory at path, as the container's
// processes see it. The container must run. It stays half done where it fails.
func (c *Container) CopyIn(ctx context.Context, path string, archive io.Reader) error {
	err := c.sandbox.onFiles(ctx, func(conn net.Conn) error { return files.Put(ctx, conn, c.id, path, archive) })
	return refusal.During(err, "copy to %s of container %q", path, c.id)
}

// CopyOut writes a tar archive of what is at path, as the container's processes see
// it, the names in it beginning with the last element of path. What it holds is the
// guest's word. The container must run.
func (c *Container) CopyOut(ctx context.Context, path string, archive io.Writer) error {
	err := c.sandbox.onFiles(ctx, func(conn net.Conn) error { return files.Get(ctx, conn, c.id, path, archive) })
	return refusal.During(err, "copy from %s of container %q", path, c.id)
}

// onFiles has f use a connection to the guest's port of files.
func (s *Sandbox) onFiles(ctx context.Context, f func(net.Conn) error) error {
	if err := s.guest.Await(ctx); err != nil {
		return err
	}
	conn, err := s.guest.Dial(ctx, files.Port)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing more is said
	return f(conn)
}
