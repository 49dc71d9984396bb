package path_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
)

func TestRunTellsOutputExitAndEventsInOrder(t *testing.T) {
	h := newHost(t, false, []string{"sh", "-c", "echo hello; exit 3"}, nil)
	c := h.newClient(false)
	h.run(c, false)
	if got := h.exited(""); got != 3 {
		t.Errorf("exit status %d, want 3", got)
	}
	if got := h.output(c); got != "hello\n" {
		t.Errorf("output %q", got)
	}
	st, err := h.State(t.Context(), &taskapi.StateRequest{ID: "c"})
	if err != nil || st.Status != task.Status_STOPPED || st.ExitStatus != 3 {
		t.Errorf("state %v, %v", st, err)
	}
	h.remove()
	h.expectEvents("create", "start", "exit c 3", "delete")
}

func TestABurstFollowedByExitArrivesWhole(t *testing.T) {
	const lines = 1_000_000
	h := newHost(t, false, []string{"seq", fmt.Sprint(lines)}, nil)
	c := h.newClient(false)
	h.run(c, false)
	if got := h.exited(""); got != 0 {
		t.Errorf("exit status %d", got)
	}
	got := sha256.Sum256([]byte(h.output(c)))
	var b bytes.Buffer
	for i := 1; i <= lines; i++ {
		fmt.Fprintln(&b, i)
	}
	if want := sha256.Sum256(b.Bytes()); got != want {
		t.Error("the output is not what was written")
	}
	h.remove()
}

func TestStdinReachesTheProcessAndCloseIOEndsIt(t *testing.T) {
	h := newHost(t, false, []string{"sha256sum"}, nil)
	c := h.newClient(true)
	h.run(c, false)
	input := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if _, err := c.in.Write(input); err != nil {
		t.Fatal(err)
	}
	if err := c.in.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.CloseIO(t.Context(), &taskapi.CloseIORequest{ID: "c", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 0 {
		t.Errorf("exit status %d", got)
	}
	if got, want := h.output(c), fmt.Sprintf("%x  -\n", sha256.Sum256(input)); got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	h.remove()
}

func TestTerminalHasItsSizeAndIsATerminal(t *testing.T) {
	h := newHost(t, true, []string{"sh", "-c", "read go; tty >/dev/null && stty size"}, nil)
	c := h.newClient(true)
	h.run(c, true)
	if _, err := h.ResizePty(t.Context(), &taskapi.ResizePtyRequest{ID: "c", Width: 91, Height: 33}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.in.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 0 {
		t.Errorf("exit status %d", got)
	}
	if got := h.output(c); !strings.Contains(got, "33 91") {
		t.Errorf("output %q, want the size 33 91", got)
	}
	h.remove()
}

func TestExecsRunKillAndGo(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	c := h.newClient(false)
	h.exec("e1", c, "sh", "-c", "echo from exec; exit 7")
	if got := h.exited("e1"); got != 7 {
		t.Errorf("exit status of the exec %d, want 7", got)
	}
	if got := h.output(c); got != "from exec\n" {
		t.Errorf("output %q", got)
	}
	h.exec("e2", nil, "sleep", "1000")
	if _, err := h.Kill(t.Context(), &taskapi.KillRequest{ID: "c", ExecID: "e2", Signal: uint32(unix.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	if got := h.exited("e2"); got != 143 {
		t.Errorf("exit status of the killed exec %d, want 143", got)
	}
	for _, id := range []string{"e1", "e2"} {
		if _, err := h.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c", ExecID: id}); err != nil {
			t.Error(err)
		}
	}
	pids, err := h.Pids(t.Context(), &taskapi.PidsRequest{ID: "c"})
	if err != nil || len(pids.Processes) != 1 {
		t.Errorf("pids %v, %v; want the sleep alone", pids, err)
	}
	if _, err := h.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	if got := h.exited(""); got != 137 {
		t.Errorf("exit status %d, want 137", got)
	}
	h.remove()
	h.expectEvents("create", "start", "exec-added e1", "exec-started e1", "exit e1 7",
		"exec-added e2", "exec-started e2", "exit e2 143", "exit c 137", "delete")
}

func TestOutOfMemoryIsTold(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	h.expectEvents("create", "start")
	h.runtime.OOM("c")
	h.expectEvents("create", "start", "oom")
}

func TestTheVMsDeathEndsEveryProcess(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	h.exec("e", nil, "sleep", "1000")
	began := time.Now()
	(<-h.vm).Crash(errors.New("qemu has ended: killed by SIGKILL"))
	for _, exec := range []string{"", "e"} {
		if got := h.exited(exec); got != 137 {
			t.Errorf("exit status of %q: %d, want 137", exec, got)
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the waiters returned after %s", took)
	}
	if err := h.sandbox.Err(); err == nil || !strings.Contains(err.Error(), "SIGKILL") {
		t.Errorf("the reason is %v", err)
	}
	h.remove()
}

func TestTheGuestsOwnOutOfMemoryIsTold(t *testing.T) {
	h := newHost(t, false, []string{"sleep", "1000"}, nil)
	h.run(nil, false)
	(<-h.vm).Crash(fmt.Errorf("%w: its kernel has panicked: System is deadlocked on memory", hypervisor.ErrGuestOOM))
	if got := h.exited(""); got != 137 {
		t.Errorf("exit status %d, want 137", got)
	}
	if err := h.sandbox.Err(); err == nil || !strings.Contains(err.Error(), "the guest ran out of memory") || !strings.Contains(err.Error(), "raise the pod's memory limit") {
		t.Errorf("the reason is %v", err)
	}
	h.remove()
	h.expectEvents("create", "start", "oom", "exit c 137", "delete")
}

func TestCreateSaysWhyTheGuestDoesNotCome(t *testing.T) {
	short := func(h *host) { h.config.Runtime.BootTimeout = config.Duration{Duration: 200 * time.Millisecond} }
	for name, tt := range map[string]struct {
		guest func(ctx context.Context, g *hypertest.GuestEnd) error
		want  string
	}{
		"dies": {func(context.Context, *hypertest.GuestEnd) error {
			return errors.New("the guest's kernel has panicked: no init")
		}, "no init"},
		"never calls": {func(ctx context.Context, _ *hypertest.GuestEnd) error {
			<-ctx.Done()
			return nil
		}, "boot_timeout (200ms)"},
		"calls and is silent": {func(ctx context.Context, g *hypertest.GuestEnd) error {
			if _, err := g.DialControl(ctx); err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		}, "boot_timeout (200ms)"},
		"talks garbage": {func(ctx context.Context, g *hypertest.GuestEnd) error {
			conn, err := g.DialControl(ctx)
			if err != nil {
				return err
			}
			conn.Write(bytes.Repeat([]byte{0xff}, 4096)) //nolint:errcheck // the host may close first
			<-ctx.Done()
			return nil
		}, "boot the VM: "},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, false, []string{"true"}, func(h *host, l *hypertest.Loopback) {
				short(h)
				l.Guest = tt.guest
			})
			err := h.create(nil, false)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Create: %v, want one line with %q", err, tt.want)
			}
		})
	}
}

func TestCommandsThatCannotRunAreOneClearError(t *testing.T) {
	h := newHost(t, false, []string{"no-such-command"}, nil)
	err := h.create(nil, false)
	if err == nil || !strings.Contains(err.Error(), "no-such-command") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Create: %v, want one line that names the command", err)
	}
}

func TestAMissingRootfsIsOneClearError(t *testing.T) {
	h := newHost(t, false, []string{"true"}, nil)
	if err := unix.Rmdir(h.bundle + "/rootfs"); err != nil {
		t.Fatal(err)
	}
	err := h.create(nil, false)
	if err == nil || !strings.Contains(err.Error(), h.bundle+"/rootfs does not exist") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Create: %v, want one line that names the directory", err)
	}
}
