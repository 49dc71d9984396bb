package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
	"github.com/husk-containers/husk/virtcontainers/volume"
)

// share puts the root file system where the guest sees it, and does on the host what
// the mounts need.
func (c *Container) share(ctx context.Context, rootfs []mount.Mount, plan *spec.Plan) error {
	s := c.sandbox
	s.mu.Lock()
	s.rootfs++
	c.dir = fmt.Sprintf("%s-%d", c.id, s.rootfs)
	s.mu.Unlock()
	plan.RootIn(c.dir)
	share, err := storage.New(filepath.Join(s.privateDir(), c.dir), c.bundle, s.host.Clone)
	if err != nil {
		return err
	}
	c.undo.Push("unshare the root file system", hostStep, func(context.Context) error { return share.Close() })
	if plan.Shm != nil {
		size, tmpfs, err := volume.Tmpfs(plan.Shm, c.bundle, s.host.Clone)
		if err != nil {
			return err
		}
		if tmpfs {
			plan.GuestShm(size)
		}
	}
	if err := share.Rootfs(rootfs, plan.RootPath); err != nil {
		return err
	}
	c.undo.Push("end the connections to the host's sockets", hostStep, func(ctx context.Context) error {
		return s.sockets.RemoveContainer(ctx, c.id)
	})
	user := volume.User{ID: c.id, Bundle: c.bundle, Spec: plan.Spec, CgroupsPath: plan.CgroupsPath}
	for _, b := range plan.Binds {
		if b.Unused {
			continue
		}
		m, err := s.volumes.Add(ctx, user, b)
		if err != nil {
			return err
		}
		c.mounts = append(c.mounts, m)
		c.undo.Push("give up "+b.Field, hostStep, m.Release)
	}
	return nil
}

// readyMounts does in the guest what the mounts need, and returns the guest's
// directories at which file systems of the host appear, each after the one that it is
// below.
func (c *Container) readyMounts(ctx context.Context) ([]string, error) {
	private := c.sandbox.privateDir()
	rootfs, err := storage.FileSystems(filepath.Join(private, c.dir))
	if err != nil {
		return nil, err
	}
	var below []string
	for _, dir := range rootfs {
		below = append(below, spec.GuestShare+dir[len(private):])
	}
	ctx, cancel := c.sandbox.guest.Request(ctx) // of all together: what is copied is small
	defer cancel()
	errs := make([]error, len(c.mounts))
	var work sync.WaitGroup
	for i, m := range c.mounts {
		work.Go(func() { errs[i] = m.Ready(ctx) })
	}
	work.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	for _, m := range c.mounts {
		dirs, err := m.FileSystems()
		if err != nil {
			return nil, err
		}
		below = append(below, dirs...)
	}
	return below, nil
}

// report brings the container's last words to the host.
func (c *Container) report() {
	ctx, cancel := c.sandbox.guest.Request(context.Background())
	defer cancel()
	for _, m := range c.mounts {
		if err := m.Report(ctx); err != nil && !c.sandbox.guest.Lost(err) {
			c.sandbox.log.Warn("a container's last words are lost", "container", c.id, "err", err)
		}
	}
}
