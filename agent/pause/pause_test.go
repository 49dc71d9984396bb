package pause

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/agent/reap"
)

const arg = "pause-test-main"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == arg {
		if err := Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// newNamespace returns a Namespace whose mount the test takes away.
func newNamespace(t *testing.T, command ...string) *Namespace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a PID namespace needs root")
	}
	if len(command) == 0 {
		command = []string{"/proc/self/exe", arg}
	}
	n := New(filepath.Join(t.TempDir(), "ns", "pid"), command, reap.New())
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(n.path)) {
			t.Errorf("%s is mounted still, %v", n.path, err)
		}
	})
	return n
}

func makeIt(t *testing.T, n *Namespace) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := n.Make(ctx); errors.Is(err, unix.EPERM) {
		t.Skip("making a PID namespace needs root: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// run runs a shell script in the namespace, with a /proc of it.
func run(t *testing.T, n *Namespace, script string) string {
	t.Helper()
	cmd := exec.Command("nsenter", "--pid="+n.Path(), "unshare", "--mount", "sh", "-c", "mount -t proc proc /proc; "+script)
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("no nsenter, of the package util-linux: ", err)
	} else if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

func TestMakeOnce(t *testing.T) {
	n := newNamespace(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if err := n.Make(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	if got, want := inode(t, n.Path()), inode(t, fmt.Sprintf("/proc/%d/ns/pid", n.first.PID())); got != want {
		t.Errorf("namespace %d is at the path, want %d", got, want)
	}
	if inode(t, n.Path()) == inode(t, "/proc/self/ns/pid") {
		t.Error("it is this process's own")
	}
}

func TestFirstProcess(t *testing.T) {
	n := newNamespace(t)
	makeIt(t, n)
	if out := run(t, n, "cat /proc/1/comm"); out != "pause\n" {
		t.Errorf("it is called %q", out)
	}
	// Nothing that is sent from within ends it.
	run(t, n, "for s in $(seq 1 64); do kill -$s 1; done")
	// It buries orphans: when the last of them has gone, none is to be seen.
	if out := run(t, n, `
		for i in 1 2 3; do (sh -c 'echo $$' & true) & done; wait
		(sleep 0.2 & true); (sleep 0.1 & true)
		while grep -qs sleep /proc/[0-9]*/comm; do :; done
		grep -ls 'State:.*zombie' /proc/[0-9]*/status; true`); strings.Contains(out, "/proc") {
		t.Errorf("zombies: %s", out)
	}
	// Its root is empty, whoever may look.
	if out := run(t, n, "ls -A /proc/1/root/ /proc/1/cwd/; cat /proc/1/mountinfo | wc -l"); out != "/proc/1/cwd/:\n\n/proc/1/root/:\n1\n" {
		t.Errorf("its root holds %q", out)
	}
	select {
	case <-n.first.Done():
		t.Fatal("it has ended")
	default:
	}
	first := inode(t, n.Path())
	makeIt(t, n)
	if inode(t, n.Path()) != first {
		t.Error("the namespace is another")
	}
}

func TestMakeAgainAfterAKill(t *testing.T) {
	n := newNamespace(t)
	makeIt(t, n)
	before := n.first
	// A member dies with it.
	member := exec.Command("nsenter", "--pid="+n.Path(), "sleep", "1000")
	if err := member.Start(); errors.Is(err, exec.ErrNotFound) {
		t.Skip("no nsenter, of the package util-linux: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	run(t, n, "until grep -qs sleep /proc/[0-9]*/comm; do :; done")
	if err := before.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-before.Done()
	if err := member.Wait(); err == nil {
		t.Error("a member outlives the namespace")
	}
	makeIt(t, n)
	if n.first == before {
		t.Fatal("not made again")
	}
	if out := run(t, n, "cat /proc/1/comm"); out != "pause\n" {
		t.Errorf("it is called %q", out)
	}
}

func TestEndsWithItsMaker(t *testing.T) {
	n := newNamespace(t)
	makeIt(t, n)
	n.alive.Close() // as the kernel does when the maker ends
	select {
	case <-n.first.Done():
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
}

func TestMakeErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		command []string
		want    string
	}{
		"no program":   {[]string{"/nonexistent"}, "make shared PID namespace: fork/exec /nonexistent: no such file"},
		"ends":         {[]string{"/bin/true"}, "its first process has not come up"},
		"says nothing": {[]string{"/bin/sleep", "1000"}, "make shared PID namespace: no patience"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t, tc.command...)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if name == "says nothing" {
				time.AfterFunc(100*time.Millisecond, func() { cancel(errors.New("no patience")) })
			}
			if err := n.Make(ctx); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if n.first != nil {
				t.Error("a process is left")
			}
			n.command = []string{"/proc/self/exe", arg}
			makeIt(t, n) // nothing is in the way
		})
	}
}
