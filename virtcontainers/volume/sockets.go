package volume

import (
	"context"
	"errors"
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
	end     context.CancelFunc // of following; nil before it is followed
	done    sync.WaitGroup

	turn  chan struct{} // who has put something in may use what is below
	names map[string]bool
	users map[*Mount]map[string]func(context.Context) error // how to take a socket away again
}

// watchSockets begins to look for sockets in the directory that a volume shows; nil
// where that cannot be done.
func (t *Table) watchSockets(v *volume) *socketDir {
	w, present, err := sockets.Watch(v.source.File, t.inotify, t.opts.Log)
	if err != nil {
		// Files are shared all the same.
		t.opts.Log.Warn("sockets of the host in a directory are out of reach of its containers", "source", v.source.name, "err", err)
		return nil
	}
	d := &socketDir{
		volume: v, watcher: w, turn: make(chan struct{}, 1),
		names: map[string]bool{}, users: map[*Mount]map[string]func(context.Context) error{},
	}
	for _, name := range present {
		d.names[name] = true
	}
	return d
}

// begin waits for the turn; the function that it returns gives it back.
func (d *socketDir) begin(ctx context.Context) (end func(), err error) {
	select {
	case d.turn <- struct{}{}:
		return func() { <-d.turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// follow has the guest follow the directory until stop.
func (d *socketDir) follow(ctx context.Context) {
	following, end := context.WithCancel(context.WithoutCancel(ctx))
	d.end = end
	d.done.Go(func() {
		d.watcher.Run(following, func(c sockets.Change) { d.change(following, c) })
	})
}

// join gives a mount's container the sockets of the directory.
func (d *socketDir) join(ctx context.Context, m *Mount) error {
	end, err := d.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	d.users[m] = map[string]func(context.Context) error{}
	for name := range d.names {
		if err := d.add(ctx, m, name); err != nil {
			return err
		}
	}
	return nil
}

// leave takes them away.
func (d *socketDir) leave(ctx context.Context, m *Mount) error {
	end, err := d.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	var errs []error
	for _, remove := range d.users[m] {
		errs = append(errs, remove(ctx))
	}
	delete(d.users, m)
	return errors.Join(errs...)
}

// change follows the host's directory.
func (d *socketDir) change(ctx context.Context, c sockets.Change) {
	end, err := d.begin(ctx)
	if err != nil {
		return
	}
	defer end()
	var errs []error
	for _, name := range c.Removed {
		delete(d.names, name)
		for _, added := range d.users {
			if remove := added[name]; remove != nil {
				delete(added, name)
				errs = append(errs, remove(ctx))
			}
		}
	}
	for _, name := range c.Added {
		d.names[name] = true
		for m := range d.users {
			errs = append(errs, d.add(ctx, m, name))
		}
	}
	if err := errors.Join(errs...); err != nil && ctx.Err() == nil && !d.volume.table.opts.Guest.Lost(err) {
		d.volume.table.opts.Log.Warn("a socket of the host is out of reach", "err", err)
	}
}

// add makes the socket, or makes it anew. One that has gone meanwhile, or that the
// configuration does not allow, stays as it is seen: dead.
func (d *socketDir) add(ctx context.Context, m *Mount, name string) error {
	s := m.user.socket(filepath.Join(d.volume.source.name, name), path.Join(d.volume.path, name))
	_, remove, err := d.volume.table.opts.Sockets.Add(ctx, s)
	switch {
	case errdefs.IsPermissionDenied(err):
		d.volume.table.opts.Log.Info("a socket of the host stays out of reach", "container", m.user.ID, "err", err)
		return nil
	case errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errdefs.IsFailedPrecondition(err):
		return nil
	case err != nil:
		return err
	}
	d.users[m][name] = remove
	return nil
}

// stop ends what watchSockets and follow began, once no mount is left.
func (d *socketDir) stop() {
	if d.end == nil {
		d.watcher.Close()
		return
	}
	d.end()
	d.done.Wait()
}
