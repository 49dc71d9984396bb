package volume

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/virtcontainers/sockets"
)

// hostSockets gives containers sockets of the host; see sockets.Table.
type hostSockets interface {
	Add(ctx context.Context, s sockets.Socket) (guestPath string, remove func(context.Context) error, err error)
}

// connect gives the user the socket that the source is.
func (v *volume) connect(ctx context.Context, u User) error {
	guestPath, remove, err := v.table.opts.Sockets.Add(ctx, u.socket(v.source.name, ""))
	if err != nil {
		return err
	}
	v.path, v.disconnect = guestPath, remove
	return nil
}

// socket is a socket of the host as the user's.
func (u User) socket(name, over string) sockets.Socket {
	return sockets.Socket{Container: u.ID, User: u.Spec.Process.User, CgroupsPath: u.CgroupsPath, Path: name, Over: over}
}

// A socketDir is a directory of the host in which there are sockets, or may be one
// day. Each gets one in the guest that is mounted over it.
type socketDir struct {
	volume  *volume
	watcher *sockets.Watcher
	present []string // as serve begins

	// owner is in whose name connections are made: the first user that is left.
	owner  User
	remove map[string]func(context.Context) error

	end  context.CancelFunc
	done sync.WaitGroup
}

// watchSockets begins to look for sockets in the directory that a volume shows; nil
// where that cannot be done.
func (t *Table) watchSockets(v *volume) *socketDir {
	w, present, err := sockets.Watch(v.source.File, t.opts.Log)
	if err != nil {
		// Files are shared all the same.
		t.opts.Log.Warn("sockets of the host in a directory are out of reach of its containers", "source", v.source.name, "err", err)
		return nil
	}
	return &socketDir{volume: v, watcher: w, present: present}
}

// serve makes the sockets that are there, and follows the directory until stop.
func (d *socketDir) serve(ctx context.Context, u User) error {
	d.owner, d.remove = u, map[string]func(context.Context) error{}
	for _, name := range d.present {
		if err := d.add(ctx, name); err != nil {
			return err
		}
	}
	following, end := context.WithCancel(context.WithoutCancel(ctx))
	d.end = end
	d.done.Go(func() {
		err := d.watcher.Run(following, func(c sockets.Change) { d.change(following, c) })
		if err != nil {
			d.volume.table.opts.Log.Warn("sockets of the host that appear from now on are out of reach", "err", err)
		}
	})
	return nil
}

// change follows the host's directory.
func (d *socketDir) change(ctx context.Context, c sockets.Change) {
	var errs []error
	for _, name := range c.Removed {
		if remove := d.remove[name]; remove != nil {
			delete(d.remove, name)
			errs = append(errs, remove(ctx))
		}
	}
	for _, name := range c.Added {
		errs = append(errs, d.add(ctx, name))
	}
	if err := errors.Join(errs...); err != nil && ctx.Err() == nil && !d.volume.table.opts.Guest.Lost(err) {
		d.volume.table.opts.Log.Warn("a socket of the host is out of reach", "err", err)
	}
}

// add makes the socket, or makes it anew. One that has gone meanwhile, or that the
// configuration does not allow, stays as it is seen: dead.
func (d *socketDir) add(ctx context.Context, name string) error {
	s := d.owner.socket(filepath.Join(d.volume.source.name, name), path.Join(d.volume.path, name))
	_, remove, err := d.volume.table.opts.Sockets.Add(ctx, s)
	switch {
	case errdefs.IsPermissionDenied(err):
		d.volume.table.opts.Log.Info("a socket of the host stays out of reach", "err", err)
		return nil
	case errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errdefs.IsFailedPrecondition(err):
		return nil
	case err != nil:
		return err
	}
	d.remove[name] = remove
	return nil
}

// leave makes another user the owner where the owner goes.
func (d *socketDir) leave(ctx context.Context, gone, left User) error {
	if d.end == nil || d.owner.ID != gone.ID {
		return nil
	}
	if err := d.stop(ctx); err != nil {
		return err
	}
	w, present, err := sockets.Watch(d.volume.source.File, d.volume.table.opts.Log)
	if err != nil {
		return err
	}
	d.watcher, d.present, d.end = w, present, nil
	return d.serve(ctx, left)
}

// stop ends what serve began.
func (d *socketDir) stop(ctx context.Context) error {
	if d.end == nil { // it was never served
		if err := d.watcher.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			return err
		}
		return nil
	}
	d.end()
	d.done.Wait()
	d.end = nil
	var errs []error
	for _, remove := range d.remove {
		errs = append(errs, remove(ctx))
	}
	return errors.Join(errs...)
}
