package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/husk-containers/husk/guest/initrd"
	"github.com/husk-containers/husk/test/rig/job"
	"github.com/husk-containers/husk/test/rig/machine"
	"golang.org/x/sys/unix"
)

// asRig in the environment makes the test binary be the rig.
const asRig = "HUSK_RIG_TEST_AS_RIG"

func TestMain(m *testing.M) {
	if os.Getenv(asRig) != "" {
		main()
	}
	os.Exit(m.Run())
}

// needRig skips a test that boots the rig unless it is asked for.
func needRig(t *testing.T) {
	t.Helper()
	if os.Getenv("HUSK_RIG_TEST") == "" {
		t.Skip("boots a virtual machine, as root: set HUSK_RIG_TEST=1")
	}
}

// bootTimeout is long for a loaded machine; a boot takes five to ten seconds.
const bootTimeout = 5 * time.Minute

// inRig runs a shell script in the rig.
func inRig(t *testing.T, outDir, script string, env ...string) (code int, stdout, stderr bytes.Buffer, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	code, err = machine.Run(ctx, machine.Config{
		Job:       job.Job{Args: []string{"/bin/sh", "-c", script}, Env: append(os.Environ(), env...), Dir: "/"},
		CPUs:      2,
		MemoryMiB: 4096,
		OutDir:    outDir,
		Stdout:    &stdout,
		Stderr:    &stderr,
	})
	return code, stdout, stderr, err
}

func TestOutputIsExactAndCodeReturned(t *testing.T) {
	needRig(t)
	dir := t.TempDir()
	blob := make([]byte, 10<<20)
	rand.Read(blob)
	if err := os.WriteFile(filepath.Join(dir, "blob"), blob, 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr, err := inRig(t, dir, "cat /out/blob; head -c 1000000 /out/blob >&2; echo done >/out/result; sleep 1000 & exit 7")
	if code != 7 || err != nil {
		t.Fatalf("code %d, error %v, want 7 and none", code, err)
	}
	if !bytes.Equal(stdout.Bytes(), blob) {
		t.Errorf("stdout differs; it has %d bytes of %d", stdout.Len(), len(blob))
	}
	if !bytes.Equal(stderr.Bytes(), blob[:1_000_000]) {
		t.Errorf("stderr differs; it has %d bytes of %d", stderr.Len(), 1_000_000)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "result")); string(got) != "done\n" || err != nil {
		t.Errorf("result file holds %q, %v", got, err)
	}
}

// TestHost runs TestInside in the rig.
func TestHost(t *testing.T) {
	needRig(t)
	dir := t.TempDir()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rig.test"), self, 0o755); err != nil {
		t.Fatal(err)
	}
	writeNestedInitrd(t, dir)
	code, stdout, stderr, err := inRig(t, dir, "exec /out/rig.test -test.v -test.run '^TestInside$'", insideRig+"=1")
	t.Logf("in the rig:\n%s%s", &stdout, &stderr)
	if code != 0 || err != nil {
		t.Errorf("code %d, error %v", code, err)
	}
	if !strings.Contains(stdout.String(), "--- PASS: TestInside") {
		t.Error("TestInside did not run")
	}
}

func writeNestedInitrd(t *testing.T, dir string) {
	t.Helper()
	binary := filepath.Join(dir, "nested")
	build := exec.Command("go", "build", "-o", binary, "./testdata/nested")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build nested init: %v\n%s", err, out)
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := initrd.Write(&archive, initrd.File("init", 0o755, program), initrd.CharDevice("dev/console", 0o600, 5, 1)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "nested.cpio"), archive.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestPanicShowsTheConsole(t *testing.T) {
	needRig(t)
	_, _, _, err := inRig(t, "", "echo c >/proc/sysrq-trigger")
	if err == nil || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("error %v, want the console's last lines", err)
	}
}

// TestEndedRigLeavesNothing ends the rig by signals while its command runs.
func TestEndedRigLeavesNothing(t *testing.T) {
	needRig(t)
	for _, test := range []struct {
		signal unix.Signal
		code   int // -1: killed
	}{{unix.SIGINT, 130}, {unix.SIGTERM, 143}, {unix.SIGKILL, -1}} {
		t.Run(test.signal.String(), func(t *testing.T) {
			// Orphans come to this process, so that it can wait for every one.
			if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
				t.Fatal(err)
			}
			defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // as it was
			tmp := t.TempDir()
			rig := exec.Command("/proc/self/exe", "--", "/bin/sh", "-c", "echo up; exec sleep 1000")
			rig.Env = append(os.Environ(), asRig+"=1", "TMPDIR="+tmp)
			stdout, err := rig.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := rig.Start(); err != nil {
				t.Fatal(err)
			}
			var up [3]byte
			if _, err := stdout.Read(up[:]); err != nil || string(up[:]) != "up\n" {
				t.Errorf("read %q, %v", up, err)
			}
			if err := rig.Process.Signal(test.signal); err != nil {
				t.Fatal(err)
			}
			rig.Wait()
			if got := rig.ProcessState.ExitCode(); got != test.code {
				t.Errorf("exit code %d, want %d", got, test.code)
			}
			// It blocks until each of the rig's processes has ended.
			for {
				if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
					break
				} else if err != nil && !errors.Is(err, unix.EINTR) {
					t.Fatal(err)
				}
			}
			left, err := os.ReadDir(tmp)
			if len(left) != 0 || err != nil {
				t.Errorf("left in the temporary directory: %v, %v", left, err)
			}
		})
	}
}
