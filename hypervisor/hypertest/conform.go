package hypertest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/husk-containers/husk/hypervisor"
)

// bootTimeout bounds each case; it suits a translated guest on a busy machine.
const bootTimeout = 2 * time.Minute

// A Subject is a backend with a guest that does what the suite expects: it dials
// the control connection as its first act, serves Port, closes a connection to it
// whose peer has half-closed before its greeting was complete, and powers itself
// off when the control connection is closed.
type Subject struct {
	Hypervisor hypervisor.Hypervisor
	// Config of the guest, without Started.
	Config hypervisor.Config
	// Port of the guest that is served.
	Port uint32
	// Greet is an exchange in both directions on a connection to Port.
	Greet func(ctx context.Context, conn net.Conn) error
	// Kill ends the monitor as SIGKILL does, which is what nil stands for.
	Kill func(hypervisor.VM)
}

// Conform is what the layers above rely on, as tests. make is called for each of
// them; it may skip.
func Conform(t *testing.T, make func(t *testing.T) Subject) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *conformance)
	}{
		{"Check names what Start will use", testCheck},
		{"Accept is readiness, and Dial reaches the guest", testConnections},
		{"Stop is idempotent and no failure", testStop},
		{"Stop kills when its context has ended", testStopKills},
		{"a guest that powers itself off is told of", testPowerOff},
		{"the monitor's death is the reason", testKilled},
		{"Started hears of every process and can refuse each", testStarted},
		{"an invalid device is an error", testInvalidDevice},
		{"nothing is left", testNothingLeft},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
			t.Cleanup(cancel) // after those of the test
			c.test(t, &conformance{make(t), ctx})
		})
	}
}

// A conformance is one case under way.
type conformance struct {
	Subject
	ctx context.Context //nolint:containedctx // bounds the case
}

// start boots a VM that ends with the test at the latest.
func (c *conformance) start(t *testing.T) hypervisor.VM {
	t.Helper()
	vm, err := c.Hypervisor.Start(c.ctx, c.Config)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	t.Cleanup(func() { c.stop(t, vm) })
	return vm
}

func (c *conformance) accept(t *testing.T, vm hypervisor.VM) net.Conn {
	t.Helper()
	conn, err := vm.Accept(c.ctx)
	if err != nil {
		t.Fatalf("Accept: %v", err)
	}
	t.Cleanup(func() { conn.Close() }) //nolint:errcheck // it may be closed
	return conn
}

func (c *conformance) stop(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	if err := vm.Stop(c.ctx); err != nil {
		t.Errorf("Stop: %v", err)
	}
	c.done(t, vm)
}

func (c *conformance) done(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	select {
	case <-vm.Done():
	case <-c.ctx.Done():
		t.Fatal("the VM has not ended")
	}
}

func testCheck(t *testing.T, c *conformance) {
	found, err := c.Hypervisor.Check(c.ctx)
	if err != nil {
		t.Fatalf("Check: %v", err)
	}
	if found.Version.Value == "" ||
		!slices.Contains([]string{"kvm", "tcg"}, found.Accelerator.Value) ||
		!slices.Contains([]string{"vhost-vsock", "virtio-serial"}, found.Channel.Value) {
		t.Errorf("Check: %+v", found)
	}
}

func testConnections(t *testing.T, c *conformance) {
	vm := c.start(t)
	ended, end := context.WithCancelCause(c.ctx)
	why := errors.New("given up")
	end(why)
	if _, err := vm.Accept(ended); !errors.Is(err, why) {
		t.Errorf("Accept with an ended context: %v", err)
	}
	if _, err := vm.Dial(ended, c.Port); !errors.Is(err, why) {
		t.Errorf("Dial with an ended context: %v", err)
	}
	c.accept(t, vm)
	if err := vm.Err(); err != nil {
		t.Errorf("Err of a running VM: %v", err)
	}

	conn, err := vm.Dial(c.ctx, c.Port)
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	defer conn.Close()
	if err := c.Greet(c.ctx, conn); err != nil {
		t.Errorf("greet the guest: %v", err)
	}

	half, err := vm.Dial(c.ctx, c.Port)
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	defer half.Close()
	closer, ok := half.(interface{ CloseWrite() error })
	if !ok {
		t.Fatalf("%T does not half-close", half)
	}
	if err := closer.CloseWrite(); err != nil {
		t.Errorf("CloseWrite: %v", err)
	}
	if n, err := io.Copy(io.Discard, half); n != 0 || err != nil {
		t.Errorf("read %d bytes after the half-close, %v", n, err)
	}

	c.stop(t, vm)
	io.Copy(io.Discard, conn) //nolint:errcheck // it ends, one way or the other
}

func testStop(t *testing.T, c *conformance) {
	vm := c.start(t)
	for range 2 {
		c.stop(t, vm)
	}
	if err := vm.Err(); err != nil {
		t.Errorf("Err: %v", err)
	}
	if _, err := vm.Accept(c.ctx); err == nil {
		t.Error("Accept after Stop succeeded")
	}
	if _, err := vm.Dial(c.ctx, c.Port); err == nil {
		t.Error("Dial after Stop succeeded")
	}
}

func testStopKills(t *testing.T, c *conformance) {
	vm := c.start(t)
	ended, end := context.WithCancel(c.ctx)
	end()
	if err := vm.Stop(ended); err != nil {
		t.Errorf("Stop: %v", err)
	}
	c.done(t, vm)
	if err := vm.Err(); err != nil {
		t.Errorf("Err: %v", err)
	}
}

func testPowerOff(t *testing.T, c *conformance) {
	vm := c.start(t)
	if err := c.accept(t, vm).Close(); err != nil {
		t.Fatal(err)
	}
	c.done(t, vm)
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "powered itself off") {
		t.Errorf("Err: %v, want that the guest powered itself off", err)
	}
	if _, err := vm.Accept(c.ctx); err == nil {
		t.Error("Accept of an ended VM succeeded")
	}
}

func testKilled(t *testing.T, c *conformance) {
	vm := c.start(t)
	accepted := make(chan error, 1)
	go func() {
		for { // the guest may have come first
			conn, err := vm.Accept(c.ctx)
			if err != nil {
				accepted <- err
				return
			}
			defer conn.Close()
		}
	}()
	if c.Kill != nil {
		c.Kill(vm)
	} else if err := syscall.Kill(vm.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.done(t, vm)
	reason := vm.Err()
	if reason == nil || strings.Contains(reason.Error(), "\n") {
		t.Fatalf("Err: %v, want a reason in one line", reason)
	}
	if !errors.Is(reason, hypervisor.ErrKilled) {
		t.Errorf("Err: %v, want an ErrKilled", reason)
	}
	if err := <-accepted; !errors.Is(err, reason) {
		t.Errorf("Accept: %v, want the reason %v", err, reason)
	}
	if _, err := vm.Dial(c.ctx, c.Port); !errors.Is(err, reason) {
		t.Errorf("Dial: %v, want the reason %v", err, reason)
	}
	c.stop(t, vm)
	if err := vm.Err(); !errors.Is(err, reason) {
		t.Errorf("Err after a late Stop: %v, want the reason %v", err, reason)
	}
}

func testStarted(t *testing.T, c *conformance) {
	for refuse := 0; ; refuse++ {
		refusal := errors.New("no record")
		var told []hypervisor.Process
		c.Config.Started = func(p hypervisor.Process) error {
			told = append(told, p)
			if len(told) > refuse {
				return refusal
			}
			return nil
		}
		vm, err := c.Hypervisor.Start(c.ctx, c.Config)
		if err == nil {
			if !slices.ContainsFunc(told, func(p hypervisor.Process) bool { return p.PID == vm.PID() }) {
				t.Errorf("the monitor %d is not among %v", vm.PID(), told)
			}
			c.stop(t, vm)
		} else if !errors.Is(err, refusal) {
			t.Fatalf("Start: %v, want Started's own error", err)
		}
		for _, p := range told {
			if p.Name == "" || p.PID <= 0 {
				t.Errorf("told of %+v", p)
			}
			if err := syscall.Kill(p.PID, 0); p.PID != os.Getpid() && !errors.Is(err, syscall.ESRCH) {
				t.Errorf("%s is left: %v", p.Name, err)
			}
		}
		if err == nil {
			if refuse == 0 {
				t.Error("Started was never called")
			}
			return
		}
	}
}

// alien is of no kind that any backend has.
type alien struct{ hypervisor.Share }

func testInvalidDevice(t *testing.T, c *conformance) {
	c.Config.Devices = append(slices.Clone(c.Config.Devices), alien{})
	if vm, err := c.Hypervisor.Start(c.ctx, c.Config); err == nil {
		c.stop(t, vm)
		t.Error("Start succeeded")
	}
}

// testNothingLeft starts and stops often, and counts what this process has open
// and runs.
func testNothingLeft(t *testing.T, c *conformance) {
	const failing, succeeding = 20, 5
	bad := c.Config
	bad.Started = func(hypervisor.Process) error { return errors.New("no record") }
	invalid := c.Config
	invalid.Devices = append(slices.Clone(c.Config.Devices), alien{})
	round := func(failing, succeeding int) {
		for i := range failing {
			cfg := bad
			if i%2 == 0 {
				cfg = invalid
			}
			if vm, err := c.Hypervisor.Start(c.ctx, cfg); err == nil {
				c.stop(t, vm)
				t.Error("Start succeeded")
			}
		}
		for range succeeding {
			c.stop(t, c.start(t))
		}
	}
	round(2, 1) // what is opened once and for all
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	round(failing, succeeding)
	// Threads and finalizers are not done at once.
	for openFiles(t) > files || runtime.NumGoroutine() > goroutines {
		if c.ctx.Err() != nil {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d files open, were %d; %d goroutines, were %d\n%s", openFiles(t), files,
				runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}
