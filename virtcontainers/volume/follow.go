package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/storage"
)

// Follow shows what the host mounts later below sources that are to show that, and has
// the guest's agent hold it, until ctx ends; see
// agentv1.CreateContainerRequest.file_systems. Before there is such a source it waits.
func (t *Table) Follow(ctx context.Context) {
	select {
	case <-t.follows:
	case <-ctx.Done():
		return
	}
	// The host's mounts do not wait for the guest.
	changed := make(chan struct{}, 1)
	var holding sync.WaitGroup
	holding.Go(func() {
		for range changed {
			t.hold(ctx)
		}
	})
	err := eachMount(ctx, func() {
		t.syncAll()
		select {
		case changed <- struct{}{}:
		default: // it will look anyway
		}
	})
	if err != nil && ctx.Err() == nil {
		t.opts.Log.Error("follow the host's mounts", "err", err)
	}
	close(changed)
	holding.Wait()
}

// syncAll shows what the host has now.
func (t *Table) syncAll() {
	t.mu.Lock()
	mirrors := slices.Clone(t.mirrors)
	t.mu.Unlock()
	for _, m := range mirrors {
		if err := m.Sync(); err != nil {
			t.opts.Log.Warn("the host's mounts are not all shown", "err", err)
		}
	}
}

// hold tells the agent of the file systems that it has not been told of.
func (t *Table) hold(ctx context.Context) {
	t.mu.Lock()
	followers := slices.Clone(t.followers)
	t.mu.Unlock()
	for _, m := range followers {
		dirs, err := m.fileSystems()
		if err != nil {
			t.opts.Log.Error("follow the host's mounts", "field", m.bind.Field, "err", err)
			continue
		}
		t.mu.Lock()
		fresh := slices.DeleteFunc(slices.Clone(dirs), func(d string) bool { return slices.Contains(m.held, d) })
		t.mu.Unlock()
		if len(fresh) > 0 {
			err = t.tell(ctx, m, fresh)
		}
		if err == nil {
			t.mu.Lock()
			m.held = dirs
			t.mu.Unlock()
		} else if ctx.Err() == nil && !t.opts.Guest.Lost(err) {
			t.opts.Log.Warn("a file system that the host mounted later is not held in the guest", "container", m.user.ID, "field", m.bind.Field, "err", err)
		}
	}
}

// tell has the agent hold file systems.
func (t *Table) tell(ctx context.Context, m *Mount, fileSystems []string) error {
	return t.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.HoldFileSystems(ctx, &agentv1.HoldFileSystemsRequest{ContainerId: m.user.ID, FileSystems: fileSystems})
		return err
	})
}

// follow begins to watch for what comes below the mount. What has come since held was
// listed is found by the first look.
func (t *Table) follow(m *Mount, held []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m.held = held
	t.followers = append(t.followers, m)
}

func (t *Table) unfollow(m *Mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.followers = slices.DeleteFunc(t.followers, func(f *Mount) bool { return f == m })
}

// follow shows the source as the host has it at any time.
func (v *volume) follow(how storage.Attributes) error {
	m, err := storage.NewMirror(v.source.File, v.table.opts.Stage, v.dir(), how)
	if err != nil {
		return err
	}
	// What else looks into the source keeps nothing of the host's busy either.
	v.mirror, v.source.File = m, m.Root()
	t := v.table
	t.mu.Lock()
	t.mirrors = append(t.mirrors, m)
	t.mu.Unlock()
	t.once.Do(func() { close(t.follows) })
	return m.Sync() // with what has come before it was in the table
}

func (v *volume) unfollow() error {
	t := v.table
	t.mu.Lock()
	t.mirrors = slices.DeleteFunc(t.mirrors, func(m *storage.Mirror) bool { return m == v.mirror })
	t.mu.Unlock()
	return v.mirror.Close()
}

// eachMount calls f, and again after each change of this process's mounts, until ctx
// ends. The kernel tells by an exceptional condition on mountinfo (proc(5)).
func eachMount(ctx context.Context, f func()) error {
	// Not by os.Open: Go's own poller would take part of the conditions, of which the
	// kernel tells a file once.
	mounts, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open mountinfo: %w", err)
	}
	defer unix.Close(mounts) //nolint:errcheck // read only
	end, ended, err := os.Pipe()
	if err != nil {
		return err
	}
	defer end.Close()                                        //nolint:errcheck // read only
	defer ended.Close()                                      //nolint:errcheck // it may be closed
	stop := context.AfterFunc(ctx, func() { ended.Close() }) //nolint:errcheck // it ends the poll
	defer stop()
	fds := []unix.PollFd{{Fd: int32(mounts), Events: unix.POLLPRI}, {Fd: int32(end.Fd()), Events: unix.POLLIN}}
	for {
		f()
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll mountinfo: %w", err)
		}
		if fds[1].Revents != 0 {
			return nil
		}
	}
}
