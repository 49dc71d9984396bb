package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// Follow has the guest's agent hold what the host mounts later below sources that are
// to show that, until ctx ends; see agentv1.CreateContainerRequest.file_systems.
// Before there is such a source it waits.
func (t *Table) Follow(ctx context.Context) {
	select {
	case <-t.follows:
	case <-ctx.Done():
		return
	}
	if err := eachMount(ctx, func() { t.holdNew(ctx) }); err != nil && ctx.Err() == nil {
		t.opts.Log.Error("follow the host's mounts", "err", err)
	}
}

// holdNew tells the agent of the file systems that it has not been told of.
func (t *Table) holdNew(ctx context.Context) {
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
		fresh := slices.DeleteFunc(dirs, func(d string) bool { return slices.Contains(m.held, d) })
		m.held = append(m.held, fresh...)
		t.mu.Unlock()
		if len(fresh) == 0 {
			continue
		}
		err = t.opts.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
			_, err := a.HoldFileSystems(ctx, &agentv1.HoldFileSystemsRequest{ContainerId: m.user.ID, FileSystems: fresh})
			return err
		})
		if err != nil && !t.opts.Guest.Lost(err) {
			t.opts.Log.Warn("a file system that the host mounted later is not held in the guest", "container", m.user.ID, "field", m.bind.Field, "err", err)
		}
	}
}

// follow begins to watch for what comes below the mount. What has come since held was
// listed is found by the first look.
func (t *Table) follow(m *Mount, held []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m.held = held
	if len(t.followers) == 0 {
		t.once.Do(func() { close(t.follows) })
	}
	t.followers = append(t.followers, m)
}

func (t *Table) unfollow(m *Mount) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.followers = slices.DeleteFunc(t.followers, func(f *Mount) bool { return f == m })
}

// eachMount calls f, and again after each change of this process's mounts, until ctx
// ends. The kernel tells by an exceptional condition on mountinfo (proc(5)).
func eachMount(ctx context.Context, f func()) error {
	mounts, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	defer mounts.Close() //nolint:errcheck // read only
	end, ended, err := os.Pipe()
	if err != nil {
		return err
	}
	defer end.Close()                                        //nolint:errcheck // read only
	defer ended.Close()                                      //nolint:errcheck // it may be closed
	stop := context.AfterFunc(ctx, func() { ended.Close() }) //nolint:errcheck // it ends the poll
	defer stop()
	fds := []unix.PollFd{{Fd: int32(mounts.Fd()), Events: unix.POLLPRI}, {Fd: int32(end.Fd()), Events: unix.POLLIN}}
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
