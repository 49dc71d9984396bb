package reap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	var err error
	switch role := os.Getenv("HUSK_REAP_ROLE"); role {
	case "":
		os.Exit(m.Run())
	case "reaper":
		err = stress()
	default:
		err = leave(role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// leave is what an OCI runtime does: it starts a process that exits with the
// given status, and one more, names the pid of the first, and goes away without
// having waited for either.
func leave(status string) error {
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "exit " + status}, nil)
	if err != nil {
		return err
	}
	if _, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "exit 1"}, nil); err != nil {
		return err
	}
	fmt.Println(pid)
	return nil
}

func wait(t *testing.T, p *Process) Exit {
	t.Helper()
	select {
	case <-p.Done():
		return p.Exit()
	case <-time.After(30 * time.Second):
		t.Fatalf("process %d does not end", p.PID())
		return Exit{}
	}
}

func TestStartExitStatus(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137, "kill -TERM $$": 143} {
		p, err := New().Start(exec.Command("/bin/sh", "-c", script))
		if err != nil {
			t.Fatal(err)
		}
		before := time.Now().Add(-time.Minute)
		if e := wait(t, p); e.Status != want || e.At.Before(before) {
			t.Errorf("%q: exit %+v, want status %d", script, e, want)
		}
		if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal after the end: %v", err)
		}
	}
}

func TestStartNotFound(t *testing.T) {
	tab := New()
	if _, err := tab.Start(exec.Command("/nonexistent")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
	if tab.starts != 0 {
		t.Fatalf("%d starts under way", tab.starts)
	}
}

func TestSignal(t *testing.T) {
	p, err := New().Start(exec.Command("/bin/sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := wait(t, p); e.Status != 137 {
		t.Fatalf("status %d", e.Status)
	}
}

func TestMonitor(t *testing.T) {
	m := New().Monitor()
	var out strings.Builder
	cmd := exec.Command("/bin/sh", "-c", "echo hello; exit 3")
	cmd.Stdout = &out
	ch, err := m.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := m.Wait(cmd, ch); s != 3 || err != nil || out.String() != "hello\n" {
		t.Fatalf("status %d, %v, output %q", s, err, out.String())
	}
}

// TestStress runs stress in a process of its own, which is a child subreaper
// and so gets orphans as PID 1 does.
func TestStress(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "HUSK_REAP_ROLE=reaper")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// stress starts, from several goroutines at once, children that leave behind a
// process to own (often dead before its pid is read) and an orphan. No status
// may be lost, and no zombie may stay.
func stress() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	tab := New()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	collected := make(chan struct{})
	go func() { tab.Collect(ctx); close(collected) }()

	const workers, rounds = 8, 15
	errs := make(chan error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for r := range rounds {
				if err := round(tab, (w*rounds+r)%256); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	if err := <-errs; err != nil {
		return err
	}
	for { // every child gone means ECHILD; Collect is woken for each
		var info childInfo
		err := waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT)
		if errors.Is(err, unix.ECHILD) {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("process %d stays a zombie", info.PID)
		}
	}
	cancel()
	<-collected
	if len(tab.owned) != 0 || tab.starts != 0 {
		return fmt.Errorf("%d owned, %d starts left", len(tab.owned), tab.starts)
	}
	return nil
}

func round(tab *Table, status int) error {
	defer tab.Begin()()
	var out strings.Builder
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{fmt.Sprintf("HUSK_REAP_ROLE=%d", status), "GORACE=atexit_sleep_ms=0"}
	cmd.Stdout = &out
	p, err := tab.Start(cmd)
	if err != nil {
		return err
	}
	<-p.Done()
	pid, err := strconv.Atoi(strings.TrimSpace(out.String()))
	if err != nil {
		return err
	}
	child, err := tab.Own(pid)
	if err != nil {
		return err
	}
	<-child.Done()
	if child.Exit().Status != status {
		return fmt.Errorf("process %d: status %d, want %d", pid, child.Exit().Status, status)
	}
	return nil
}
