package record

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may be gone
		cmd.Wait()         //nolint:errcheck // likewise
	})
	return cmd
}

func TestCleanupTakesBackWhatIsOnRecord(t *testing.T) {
	bundle, dir := t.TempDir(), filepath.Join(t.TempDir(), "sandbox")
	if err := os.MkdirAll(filepath.Join(dir, "share", "c1"), 0o700); err != nil {
		t.Fatal(err)
	}
	r := New(bundle, dir)
	ours, reused := sleeper(t), sleeper(t)
	if err := errors.Join(r.Add("qemu", ours.Process.Pid), r.Add("virtiofsd", reused.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	// Directories stand for cgroups: one that was made, and one that was not.
	cgroup, unmade := filepath.Join(t.TempDir(), "c1"), filepath.Join(t.TempDir(), "c2")
	if err := errors.Join(r.AddCgroup([]string{cgroup, unmade}), os.Mkdir(cgroup, 0o700)); err != nil {
		t.Fatal(err)
	}
	// The second pid belongs to another process by now.
	r.held.Processes[1].StartTime--
	if err := r.Add("shim", os.Getpid()); err != nil {
		t.Fatal(err)
	}
	for range 2 { // idempotent
		if err := Cleanup(t.Context(), bundle); err != nil {
			t.Fatal(err)
		}
	}
	if err := ours.Wait(); err == nil || ours.ProcessState.Sys() == nil {
		t.Errorf("the recorded process ended with %v, want killed", err)
	}
	if err := reused.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("a stranger with a recorded pid was killed: %v", err)
	}
	for _, path := range []string{dir, cgroup, filepath.Join(bundle, fileName)} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

func TestCleanupOfGarbageSaysSo(t *testing.T) {
	bundle := t.TempDir()
	if err := os.WriteFile(filepath.Join(bundle, fileName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(t.Context(), bundle); err == nil {
		t.Error("Cleanup accepted a truncated record")
	}
}

func TestAProcessThatHasEndedIsNotHeld(t *testing.T) {
	bundle := t.TempDir()
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := New(bundle, "").Add("qemu", gone.Process.Pid); err != nil {
		t.Error(err)
	}
}

func TestWhatIsDroppedIsNotTakenBack(t *testing.T) {
	bundle := t.TempDir()
	r := New(bundle, "")
	theirs, cgroup, other := sleeper(t), filepath.Join(t.TempDir(), "c1"), filepath.Join(t.TempDir(), "c2")
	if err := errors.Join(r.Add("dialer", theirs.Process.Pid), r.AddCgroup([]string{cgroup, other}),
		os.Mkdir(cgroup, 0o700), os.Mkdir(other, 0o700), r.Drop(theirs.Process.Pid, []string{cgroup})); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(t.Context(), bundle); err != nil {
		t.Fatal(err)
	}
	if err := theirs.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("a process that was dropped was killed: %v", err)
	}
	if _, err := os.Lstat(cgroup); err != nil {
		t.Errorf("a cgroup that was dropped was removed: %v", err)
	}
	if _, err := os.Lstat(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the other is left: %v", err)
	}
}

// What start puts on record before there is a sandbox is the sandbox's.
func TestTheRecordIsTakenOver(t *testing.T) {
	bundle, cgroup := t.TempDir(), filepath.Join(t.TempDir(), "pod")
	begun, err := Open(bundle, "")
	if err != nil {
		t.Fatal(err)
	}
	if home, created := begun.Entered(); home != nil || created != nil {
		t.Errorf("a new record has %q and %q", home, created)
	}
	if err := errors.Join(begun.Enter([]string{"/home"}), begun.AddCgroup([]string{cgroup}), os.Mkdir(cgroup, 0o700)); err != nil {
		t.Fatal(err)
	}
	r, err := Open(bundle, filepath.Join(t.TempDir(), "sandbox"))
	if err != nil {
		t.Fatal(err)
	}
	if home, created := r.Entered(); !slices.Equal(home, []string{"/home"}) || !slices.Equal(created, []string{cgroup}) {
		t.Errorf("taken over: %q and %q", home, created)
	}
	if err := errors.Join(r.Add("shim", os.Getpid()), os.Mkdir(r.held.Dir, 0o700), Cleanup(t.Context(), bundle)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{cgroup, r.held.Dir, filepath.Join(bundle, fileName)} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if err := os.WriteFile(filepath.Join(bundle, fileName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(bundle, ""); err == nil {
		t.Error("Open accepted a truncated record")
	}
}
