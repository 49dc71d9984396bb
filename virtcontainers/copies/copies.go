// Package copies keeps copies of the host's small files in the guest, and has them
// follow the host's: volumes of configMaps and the like, hosts, hostname,
// resolv.conf, the termination log.
//
//	host: Source --inotify--> changed --> Copy --tar, port 1027--> guest: Target
//
// An update is always of the whole source. It is taken while events arrive: the
// guest changes nothing before the snapshot has ended, and one that turns out to be
// of two versions is broken off. Then there is an event, and it is taken anew. So
// no delay is needed for an update to be right, nor for many changes to become one.
package copies

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/protocols/files"
	"github.com/husk-containers/husk/virtcontainers/inotify"
)

// watched are the changes that make a copy out of date, of a directory's entries
// and of a file itself.
const watched = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

// Options are what a Copy is made of.
type Options struct {
	// Source is the directory or regular file, which may be open by O_PATH and of a
	// detached mount. What is mounted below it belongs to it. New takes it over.
	Source *os.File
	// Target is the guest path of the copy, below agentv1.CopiesDir.
	Target string
	// Dial opens a connection to the guest's port files.Port.
	Dial func(ctx context.Context) (net.Conn, error)
	// Inotify tells of changes.
	Inotify *inotify.Instance
	// Log is told of updates that fail, once for each cause.
	Log *slog.Logger
}

// A Copy is a copy in the guest that follows its source.
type Copy struct {
	opts    Options
	changed chan struct{} // holds one when there is something to look at
	events  *inotify.Subscriber
	cancel  context.CancelFunc
	done    chan struct{} // closed when follow has ended
	close   sync.Once

	// What is below belongs to New, then to follow, then to Close.
	watches map[int32]struct{}
	version version
	told    string // the failure that Log was told of last
}

// New copies the source to the guest and returns when it is there. From then on it
// follows the source's changes, until Close. Where a source is written while it is
// copied, that is waited for. The classes of errors are the guest's (files.Sync);
// ResourceExhausted also where the host has no inotify instance or watch left,
// InvalidArgument where the source holds what is neither a directory, nor a file, nor
// a symlink.
func New(ctx context.Context, opts Options) (*Copy, error) {
	c := &Copy{
		opts:    opts,
		changed: make(chan struct{}, 1),
		done:    make(chan struct{}),
		watches: make(map[int32]struct{}),
	}
	c.events = opts.Inotify.Subscribe(c.wake)
	err := c.update(ctx)
	for errors.Is(err, errSwitched) {
		select {
		case <-c.changed:
			err = c.update(ctx)
		case <-ctx.Done():
			err = errors.Join(context.Cause(ctx), err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		c.release()
		return nil, fmt.Errorf("copy to the guest: %w", err)
	}
	following, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.cancel = cancel
	go c.follow(following)
	return c, nil
}

// Close has the copy follow no longer, and closes the source. The copy stays in the
// guest. It is idempotent.
func (c *Copy) Close() error {
	var err error
	c.close.Do(func() {
		c.cancel()
		<-c.done
		err = c.release()
	})
	return err
}

// release gives back what a Copy holds on the host.
func (c *Copy) release() error {
	c.events.Close()
	return c.opts.Source.Close()
}

// wake has the copy look at its source, whatever has happened.
func (c *Copy) wake(inotify.Event) {
	select {
	case c.changed <- struct{}{}:
	default: // it has still to look
	}
}

// follow makes updates until ctx ends.
func (c *Copy) follow(ctx context.Context) {
	defer close(c.done)
	for {
		select {
		case <-c.changed:
		case <-ctx.Done():
			return
		}
		err := c.update(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			c.told = ""
		case errors.Is(err, errSwitched): // what switched it is the next event
		case err.Error() != c.told:
			c.told = err.Error()
			if errors.Is(err, errVanished) {
				c.opts.Log.Info("the copy in the guest stays as it is", "target", c.opts.Target, "err", err)
				continue
			}
			c.opts.Log.Warn("a copy in the guest is out of date until the next change", "target", c.opts.Target, "err", err)
		}
	}
}

// update makes the copy what the source is now.
func (c *Copy) update(ctx context.Context) error {
	conn, err := c.opts.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	s := c.snapshot()
	err = files.Sync(ctx, conn, c.opts.Target, s.write)
	c.watch(s.watches, err == nil)
	if err == nil {
		c.version = s.version()
	}
	return err
}

// watch takes over watches; all says that others are needed no longer.
func (c *Copy) watch(watches map[int32]struct{}, all bool) {
	for wd := range c.watches {
		if _, still := watches[wd]; all && !still {
			c.events.Remove(wd)
			delete(c.watches, wd)
		}
	}
	for wd := range watches {
		c.watches[wd] = struct{}{}
	}
}
