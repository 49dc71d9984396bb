package daemon

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Supervise()
	os.Exit(m.Run())
}

// TestSupervisorKeepsWhatDetaches starts a process that leaves its session and
// is orphaned at once, the way a shim's daemon is.
func TestSupervisorKeepsWhatDetaches(t *testing.T) {
	s, err := startSupervisor(false)
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "log")
	pid, err := s.start(launch{Args: []string{"sh", "-c", "setsid sleep 1000 & echo started"}, Env: os.Environ(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := WaitExit(ctx, pid); err != nil {
		t.Fatal(err)
	}
	left, err := Descendants(s.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 {
		t.Errorf("left after the parent's end: %v, want the detached child", left)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	for _, p := range left {
		if err := WaitExit(ctx, p.PID); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
	if data, err := os.ReadFile(log); err != nil || string(data) != "started\n" {
		t.Errorf("log %q, %v", data, err)
	}
}

func TestSupervisorReportsAProgramThatIsMissing(t *testing.T) {
	s, err := startSupervisor(false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if _, err := s.start(launch{Args: []string{"/nonexistent/containerd"}, Log: filepath.Join(t.TempDir(), "log")}); err == nil {
		t.Error("no error for a program that is missing")
	}
}

func TestWaitExitEndsWithItsContext(t *testing.T) {
	sleep := exec.Command("sleep", "1000")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer sleep.Wait()
	defer sleep.Process.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := WaitExit(ctx, sleep.Process.Pid); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
}
