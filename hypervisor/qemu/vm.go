package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/channel"
	"github.com/husk-containers/husk/hypervisor/qemu/memory"
	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
	"github.com/husk-containers/husk/hypervisor/qemu/vcpu"
	"github.com/husk-containers/husk/hypervisor/virtiofs"
	"github.com/husk-containers/husk/internal/child"
	"github.com/husk-containers/husk/internal/memfd"
	"github.com/husk-containers/husk/internal/undo"
)

// A vm is one QEMU with the processes it cannot live without.
//
//	running ── QEMU exits / a virtiofsd exits / Stop ──> ending ──> done
//
// supervise alone moves it; err is written before done is closed.
type vm struct {
	log     *slog.Logger
	held    undo.Stack
	carrier channel.Carrier
	console *console
	daemons []*virtiofs.Daemon
	child   *child.Child
	qmp     *qmp.Client
	nics    slots
	cpus    *vcpu.CPUs
	memory  *memory.Memory
	turn    chan struct{} // holds one element while the VM's size is being changed
	watched chan struct{} // closed when the last of QEMU's events was taken

	stopOnce sync.Once
	stopping chan struct{} // closed by the first Stop
	done     chan struct{}
	err      error
}

// PID implements hypervisor.VM.
func (v *vm) PID() int { return v.child.PID() }

// Done implements hypervisor.VM.
func (v *vm) Done() <-chan struct{} { return v.done }

// Err implements hypervisor.VM.
func (v *vm) Err() error {
	select {
	case <-v.done:
		return v.err
	default:
		return nil
	}
}

// Dial implements hypervisor.VM.
func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	dctx, cancel := v.whileRunning(ctx)
	defer cancel()
	conn, err := v.carrier.Dial(dctx, port)
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() == nil:
		err = v.because(err)
	}
	return nil, fmt.Errorf("dial guest port %d: %w", port, err)
}

// Accept implements hypervisor.VM. Where the guest does not call in time its
// last console lines are in the error.
func (v *vm) Accept(ctx context.Context) (net.Conn, error) {
	actx, cancel := v.whileRunning(ctx)
	defer cancel()
	conn, err := v.carrier.Accept(actx)
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%w%s", context.Cause(ctx), v.lastWords())
	}
	return nil, v.because(err)
}

// whileRunning returns a context that ends when the VM does.
func (v *vm) whileRunning(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-v.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// because returns why the VM ended where that is what is behind err: the channel
// breaks a moment before the process is seen dead.
func (v *vm) because(err error) error {
	grace := time.NewTimer(diagnosisGrace)
	defer grace.Stop()
	select {
	case <-v.done:
	case <-grace.C:
		return fmt.Errorf("%w%s", err, v.lastWords())
	}
	if v.err != nil {
		return v.err
	}
	return errors.New("the VM was stopped")
}

// isStopping reports whether Stop was called.
func (v *vm) isStopping() bool {
	select {
	case <-v.stopping:
		return true
	default:
		return false
	}
}

// Stop implements hypervisor.VM.
func (v *vm) Stop(ctx context.Context) error {
	v.stopOnce.Do(func() { close(v.stopping) })
	select {
	case <-v.child.Done():
	default:
		defer memfd.Free(memfd.Keep(v.child.PID()))
	}
	quit := make(chan struct{})
	go func() {
		defer close(quit)
		// The guest may be gone already, and QEMU with it; only Done counts.
		v.qmp.Execute(ctx, "quit", nil, nil) //nolint:errcheck // see above
	}()
	select {
	case <-v.done:
	case <-ctx.Done():
		v.child.Kill()
		<-v.done // the kernel's time and bounded release steps
	}
	<-quit
	return nil
}

// supervise waits for the first of QEMU and its helpers to end, ends the rest,
// says why and releases everything.
func (v *vm) supervise() {
	failed := make(chan *virtiofs.Daemon, len(v.daemons))
	for _, d := range v.daemons {
		go func() {
			<-d.Done()
			failed <- d
		}()
	}
	var cause error
	select {
	case <-v.child.Done():
		if !v.isStopping() { // a Stop that comes now is not why
			cause = v.deathCause()
		}
	case d := <-failed:
		if !v.isStopping() {
			cause = v.helperCause(d)
		}
	}
	if err := v.held.Run(context.Background()); err != nil {
		v.log.Error("release a VM", "err", err)
	}
	<-v.watched // the connection is closed
	v.err = cause
	close(v.done)
}

// helperCause tells a helper that died from one that ended because QEMU did.
func (v *vm) helperCause(d *virtiofs.Daemon) error {
	grace := time.NewTimer(deathGrace)
	defer grace.Stop()
	select {
	case <-v.child.Done():
		return v.deathCause()
	case <-grace.C:
		return d.Err()
	}
}

// startCause says why QEMU did not get as far as to answer: a helper it depends
// on has died, or it has itself, or else err.
func (v *vm) startCause(err error) error {
	select {
	case <-v.child.Done():
	case <-time.After(deathGrace):
		return err
	}
	if err := v.helperKilled(); err != nil {
		return err
	}
	if killed(v.child) {
		return fmt.Errorf("qemu has ended: %w", hypervisor.ErrKilled)
	}
	return errors.New(v.child.Cause())
}

// killed tells of a process that has ended whether SIGKILL ended it.
func killed(c *child.Child) bool { return c.Status() == hypervisor.ErrKilled.Error() }

// helperKilled returns the error of a helper that was killed, if one was: that is
// what ended QEMU, or will be what is wrong with it.
func (v *vm) helperKilled() error {
	for _, d := range v.daemons {
		select {
		case <-d.Done():
			if d.Killed() {
				return d.Err()
			}
		default:
		}
	}
	return nil
}

// deathCause says why QEMU has ended, the killing of a helper first: it came
// before, but may be seen later.
func (v *vm) deathCause() error {
	cause := v.childCause()
	if err := v.helperKilled(); err != nil {
		return err
	}
	return cause
}

// childCause says why QEMU ended.
func (v *vm) childCause() error {
	select {
	case <-v.console.done: // QEMU held the other end alone
	case <-time.After(deathGrace):
	}
	if err := v.console.panicCause(); err != nil {
		return fmt.Errorf("%w%s", err, v.lastWords())
	}
	if v.child.Status() == "exit status 0" {
		return fmt.Errorf("the guest has powered itself off%s", v.lastWords())
	}
	if killed(v.child) {
		return fmt.Errorf("qemu has ended: %w%s", hypervisor.ErrKilled, v.lastWords())
	}
	return fmt.Errorf("qemu has ended: %s%s", v.child.Cause(), v.lastWords())
}

// lastWords is the end of the guest's console, as the end of an error.
func (v *vm) lastWords() string {
	if tail := v.console.tail(); tail != "" {
		return "; the guest's last console lines: " + tail
	}
	return "; the guest's console is empty"
}
