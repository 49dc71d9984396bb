package virtcontainers

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
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
	r := newRecord(bundle, dir)
	ours, reused := sleeper(t), sleeper(t)
	if err := errors.Join(r.add("qemu", ours.Process.Pid), r.add("virtiofsd", reused.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	// The second pid belongs to another process by now.
	r.Processes[1].StartTime--
	if err := r.add("shim", os.Getpid()); err != nil {
		t.Fatal(err)
	}
	for range 2 { // idempotent
		if err := Cleanup(context.Background(), bundle); err != nil {
			t.Fatal(err)
		}
	}
	if err := ours.Wait(); err == nil || ours.ProcessState.Sys() == nil {
		t.Errorf("the recorded process ended with %v, want killed", err)
	}
	if err := reused.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("a stranger with a recorded pid was killed: %v", err)
	}
	for _, path := range []string{dir, filepath.Join(bundle, recordName)} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

func TestCleanupOfGarbageSaysSo(t *testing.T) {
	bundle := t.TempDir()
	if err := os.WriteFile(filepath.Join(bundle, recordName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(context.Background(), bundle); err == nil {
		t.Error("Cleanup accepted a truncated record")
	}
}

func TestRemoveTreeNeverDeletesWhatAMountShows(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir, shown := t.TempDir(), t.TempDir()
	precious := filepath.Join(shown, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "sandbox", "rootfs")
	if err := os.MkdirAll(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(shown, target, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot bind mount here: %v", err)
	}
	if err := removeTree(filepath.Join(dir, "sandbox")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("a file of the host is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "sandbox")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tree is left: %v", err)
	}
}
