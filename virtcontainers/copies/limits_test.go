package copies

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/virtcontainers/inotify"
)

// insideEnv says that a test runs in a user namespace of its own, where it may lower
// limits.
const insideEnv = "HUSK_TEST_INSIDE"

func TestInotifyLimitsAreNamed(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestInotifyLimitsInside$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if len(out) == 0 && err != nil {
		t.Skipf("no user namespace: %v", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestInotifyLimitsInside(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		t.Skip("runs in a user namespace, by TestInotifyLimitsAreNamed")
	}
	set := func(name, value string) {
		if err := os.WriteFile("/proc/sys/user/"+name, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, sysctl string) {
		t.Helper()
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), sysctl) {
			t.Errorf("%v, want it to name %s", err, sysctl)
		}
	}
	set("max_inotify_watches", "2")
	instance := inotify.New()
	defer instance.Close()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/a/b/c", 0o755); err != nil {
		t.Fatal(err)
	}
	copied := func() error {
		source, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		_, err = New(t.Context(), Options{
			Source: source, Target: "/copy", Inotify: instance, Log: slog.New(slog.DiscardHandler),
			Dial: func(context.Context) (net.Conn, error) {
				host, guest := net.Pipe()
				go io.Copy(io.Discard, guest) // ends with host
				return host, nil
			},
		})
		return err
	}
	set("max_inotify_instances", "0")
	refused(copied(), "fs.inotify.max_user_instances")
	set("max_inotify_instances", "1") // it is made when there is room
	for range 2 {                     // the first has given back what it had
		refused(copied(), "fs.inotify.max_user_watches")
		if n := watches(t); n != 0 {
			t.Errorf("%d watches are left", n)
		}
	}
}
