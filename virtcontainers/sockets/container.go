package sockets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/virtcontainers/cgroup"
	"github.com/husk-containers/husk/virtcontainers/dialer"
)

// recorded is what the process that connects is called on record.
const recorded = "socket dialer"

// A container has a process on the host that connects to sockets in its name, from
// its first socket until RemoveContainer.
type container struct {
	table  *Table
	id     string
	ctx    context.Context //nolint:containedctx // the lifetime of its connections
	cancel context.CancelFunc
	work   sync.WaitGroup // its connections; added to under the table's mu while it owns a socket
	turn   chan struct{}  // who has put something in may change what is below
	group  *cgroup.Cgroup
	opts   dialer.Options

	// Of the table's mu: the process, nil before there is one.
	dialer *dialer.Dialer
}

// join returns the container of a socket, a new one if it is the first.
func (t *Table) join(s Socket) (*container, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("the sandbox is being stopped: %w", errdefs.ErrFailedPrecondition)
	}
	c := t.containers[s.Container]
	if c == nil {
		c = &container{table: t, id: s.Container, turn: make(chan struct{}, 1)}
		c.ctx, c.cancel = context.WithCancel(context.Background())
		t.containers[s.Container] = c
	}
	return c, nil
}

// begin takes the container's turn: one change at a time, each of which may wait for
// a process or for the guest.
func (c *container) begin(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another change of the container's sockets: %w", context.Cause(ctx))
	}
}

func (c *container) end() { <-c.turn }

// start makes the cgroup and starts the process, with the first socket. It is the
// caller's turn.
func (c *container) start(ctx context.Context, s Socket) error {
	if c.ctx.Err() != nil {
		return fmt.Errorf("container %q is being removed: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if c.process() != nil {
		return nil
	}
	c.opts = dialer.Options{UID: s.User.UID, GID: s.User.GID, Groups: s.User.AdditionalGids, Enter: c.enter}
	if s.CgroupsPath != "" && c.group == nil {
		path, err := cgroup.Parse(s.CgroupsPath)
		if err != nil {
			return fmt.Errorf("linux.cgroupsPath: %w", err)
		}
		if c.group, err = cgroup.New(path, c.table.opts.Record.AddCgroup); err != nil {
			return err
		}
	}
	if err := c.spawn(); err != nil {
		return errors.Join(err, c.stop(ctx))
	}
	return nil
}

// enter has the process on record, and in its cgroup, before it is asked for
// anything.
func (c *container) enter(pid int) error {
	if err := c.table.opts.Record.Add(recorded, pid); err != nil {
		return err
	}
	if c.group == nil {
		return nil
	}
	return c.group.Add(pid)
}

// spawn starts the process. It is the caller's turn.
func (c *container) spawn() error {
	d, err := dialer.Start(c.opts)
	if err != nil {
		return err
	}
	c.table.mu.Lock()
	c.dialer = d
	c.table.mu.Unlock()
	return nil
}

func (c *container) process() *dialer.Dialer {
	c.table.mu.Lock()
	defer c.table.mu.Unlock()
	return c.dialer
}

// respawn replaces a process that has ended.
func (c *container) respawn(ctx context.Context, old *dialer.Dialer) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.end()
	if c.ctx.Err() != nil || c.process() != old {
		return c.ctx.Err() // it has been replaced, or is not to be
	}
	if err := errors.Join(old.Stop(ctx), c.table.opts.Record.Drop(old.PID(), nil)); err != nil {
		return err
	}
	return c.spawn()
}

// connect connects to what a resolved path leads to now.
func (c *container) connect(ctx context.Context, path string) (net.Conn, error) {
	file, _, err := c.table.open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // nothing was written
	d := c.process()
	conn, err := d.Dial(ctx, file)
	if errors.Is(err, dialer.ErrGone) { // killed for want of memory, perhaps: it is in the container's cgroup
		c.table.opts.Log.Warn("the process that connects to sockets is started again", "container", c.id, "err", err)
		if err := c.respawn(ctx, d); err != nil {
			return nil, err
		}
		conn, err = c.process().Dial(ctx, file)
	}
	return conn, err
}

// stop ends what the container has on the host, once its context has ended or before
// anything was begun. It is the caller's turn.
func (c *container) stop(ctx context.Context) error {
	c.work.Wait() // its connections end with its context
	var errs []error
	var pid int
	if d := c.process(); d != nil {
		pid = d.PID()
		errs = append(errs, d.Stop(ctx))
	}
	var dirs []string
	if c.group != nil {
		dirs = c.group.Created()
		errs = append(errs, c.group.Delete(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end the connections of container %q: %w", c.id, err)
	}
	c.group = nil
	if pid == 0 && dirs == nil {
		return nil
	}
	return c.table.opts.Record.Drop(pid, dirs)
}
