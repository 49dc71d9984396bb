package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/husk-containers/husk/test/daemon"
)

type bench struct {
	d      *daemon.Daemon
	shared string // directory of the host that containers have as sharedIn
	open   []*container
	ids    int // so far
}

// The directories that loads work in, of a container.
const (
	sharedIn = "/shared" // a bind of the host's
	rootIn   = "/root"   // of its root file system
)

// A container idles, and loads are run in it.
type container struct {
	b    *bench
	name string // of the column that it is measured for
	id   string
}

// A refusal is the error of a container that was not started.
type refusal struct{ said string }

func (r *refusal) Error() string { return "start a container: " + r.said }

// start runs a container; mounts are ctr's, beside the shared directory. An error
// of the runtime's is a *refusal.
func (b *bench) start(ctx context.Context, name, runtime string, mounts ...string) (*container, error) {
	b.ids++
	c := &container{b: b, name: name, id: b.d.ID(fmt.Sprintf("f%d", b.ids))}
	args := []string{"run", "--runtime", runtime, "--fifo-dir", b.d.FIFODir(), "-d", "--null-io"}
	for _, m := range append([]string{bind(b.shared, sharedIn)}, mounts...) {
		args = append(args, "--mount", m)
	}
	// What each container writes into the shared directory is its own.
	script := "mkdir -p " + c.in(sharedIn) + " " + c.in(rootIn) + " && exec sleep 100000"
	cmd := b.d.Ctr(ctx, append(args, image, c.id, "sh", "-c", script)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		// containerd keeps its record of a container that did not start.
		_ = b.d.Ctr(context.WithoutCancel(ctx), "container", "rm", c.id).Run()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &refusal{strings.Join(strings.Fields(string(out)), " ")}
	}
	b.open = append(b.open, c)
	return c, nil
}

func bind(source, destination string) string {
	return "type=bind,src=" + source + ",dst=" + destination + ",options=rbind:rw"
}

// in is the container's own directory below one that loads work in.
func (c *container) in(dir string) string { return filepath.Join(dir, c.id) }

// command is an exec in the container.
func (c *container) command(ctx context.Context, args ...string) *exec.Cmd {
	c.b.ids++
	return c.b.d.Ctr(ctx, append([]string{"task", "exec", "--fifo-dir", c.b.d.FIFODir(), "--exec-id", fmt.Sprintf("e%d", c.b.ids), c.id}, args...)...)
}

// output is what an exec prints.
func (c *container) output(ctx context.Context, args ...string) ([]byte, error) {
	cmd := c.command(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w: %s%s", strings.Join(args, " "), c.name, err, stderr.Bytes(), out)
	}
	return out, nil
}

// end removes the containers that are left.
func (b *bench) end(ctx context.Context) error {
	var errs []error
	for _, c := range b.open {
		for _, args := range [][]string{{"task", "rm", "--force", c.id}, {"container", "rm", c.id}} {
			if out, err := b.d.Ctr(ctx, args...).CombinedOutput(); err != nil {
				errs = append(errs, fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out))
			}
		}
	}
	b.open = nil
	return errors.Join(errs...)
}
