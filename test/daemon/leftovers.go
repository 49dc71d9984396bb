package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settleTimeout is how long shims and what they started may take to end after
// the last task was deleted.
const settleTimeout = 15 * time.Second

// Where containerd keeps bundles, below root and state: those of its tasks, and of
// pods by the sandbox API.
const (
	tasks = "io.containerd.runtime.v2.task"
	pods  = "io.containerd.sandbox.controller.v1.shim"
)

const cgroupRoot = "/sys/fs/cgroup"

// Close removes all containers, ends containerd, and returns what they left
// behind, one line each: processes, mounts, cgroups, sockets, files. Then that
// is removed too.
func (d *Daemon) Close(ctx context.Context) (leftovers []string, err error) {
	err = errors.Join(d.removeContainers(ctx), d.settle(ctx))
	processes, processErr := d.Processes()
	for _, p := range processes {
		leftovers = append(leftovers, "process: "+p.String())
	}
	err = errors.Join(err, processErr, d.Stop(ctx))
	for _, path := range append(d.taskFiles(), d.podFiles()...) {
		leftovers = append(leftovers, "file: "+path)
	}
	mounts, mountErr := d.mounts()
	cgroups, cgroupErr := d.cgroups()
	err = errors.Join(err, mountErr, cgroupErr)
	for _, target := range mounts {
		leftovers = append(leftovers, "mount: "+target)
	}
	for _, dir := range cgroups {
		// containerd makes the namespace's cgroup and never removes it.
		if filepath.Base(dir) != d.Token {
			leftovers = append(leftovers, "cgroup: "+dir)
		}
	}
	return leftovers, errors.Join(err, d.abandon())
}

// abandon kills and removes everything, whatever state it is in.
func (d *Daemon) abandon() error {
	var err error
	if d.supervisor != nil {
		err = d.supervisor.close()
	}
	mounts, mountErr := d.mounts()
	err = errors.Join(err, mountErr)
	for i := len(mounts) - 1; i >= 0; i-- {
		if e := unix.Unmount(mounts[i], unix.MNT_DETACH); e != nil && !errors.Is(e, unix.EINVAL) {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", mounts[i], e))
		}
	}
	cgroups, cgroupErr := d.cgroups()
	err = errors.Join(err, cgroupErr)
	for i := len(cgroups) - 1; i >= 0; i-- { // children first
		err = errors.Join(err, os.Remove(cgroups[i]))
	}
	for _, path := range d.results() {
		err = errors.Join(err, os.Remove(path))
	}
	return errors.Join(err, os.RemoveAll(d.Dir))
}

// removeContainers deletes every task and container that is left.
func (d *Daemon) removeContainers(ctx context.Context) error {
	ids, err := d.list(ctx, "task", "ls", "-q")
	if err != nil {
		return err
	}
	for _, id := range ids {
		if out, rmErr := d.Ctr(ctx, "task", "rm", "--force", id).CombinedOutput(); rmErr != nil {
			err = errors.Join(err, fmt.Errorf("remove task %s: %w: %s; containerd's log ends:\n%s", id, rmErr, out, d.Log(20)))
		}
	}
	ids, listErr := d.list(ctx, "container", "ls", "-q")
	err = errors.Join(err, listErr)
	for _, id := range ids {
		if out, rmErr := d.Ctr(ctx, "container", "rm", id).CombinedOutput(); rmErr != nil {
			err = errors.Join(err, fmt.Errorf("remove container %s: %w: %s", id, rmErr, out))
		}
	}
	return err
}

func (d *Daemon) list(ctx context.Context, args ...string) ([]string, error) {
	if d.pid == 0 {
		return nil, nil
	}
	out, err := d.Ctr(ctx, args...).Output()
	if err != nil {
		return nil, fmt.Errorf("ctr %s: %w", strings.Join(args, " "), err)
	}
	return strings.Fields(string(out)), nil
}

// settle waits for the shims' processes to end, and for containerd to clean up
// after those that died. What outlives the time is not an error here: Close
// reports it.
func (d *Daemon) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		left, err := d.Processes()
		if err != nil || len(left) == 0 && len(d.taskFiles()) == 0 {
			return err
		}
		for _, p := range left {
			if err := WaitExit(ctx, p.PID); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
		}
		select {
		case <-tick.C: // containerd tells nobody when its clean-up has ended
		case <-ctx.Done():
			return nil
		}
	}
}

// taskFiles lists what belongs to a task or a pod in the directories of containerd
// and Husk: nothing, when there is none.
func (d *Daemon) taskFiles() []string {
	var list []string
	for _, pattern := range []string{
		"root/" + tasks + "/*/*", "state/" + tasks + "/*/*", "state/" + tasks + "/*/.*",
		"root/" + pods + "/*/*", "state/" + pods + "/*/*", "husk/*",
	} {
		list = append(list, d.glob(pattern)...)
	}
	return list
}

// mounts lists the targets of mounts in this namespace that name the daemon.
func (d *Daemon) mounts() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var targets []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); strings.Contains(line, d.Token) {
			targets = append(targets, fields[4])
		}
	}
	return targets, nil
}

// cgroups lists the cgroups whose path names the daemon, parents first.
func (d *Daemon) cgroups() ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(cgroupRoot, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // ended since
		}
		if err == nil && entry.IsDir() && strings.Contains(path, d.Token) {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	return dirs, nil
}
