package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/husk-containers/husk/internal/child"
)

// start runs start for the containerd of another bundle, and returns the address.
func (b bundle) start(containerd bundle, id string, stdin []byte) (string, error) {
	b.t.Helper()
	cmd := exec.Command("/proc/self/exe", "-namespace", "test", "-address", containerd.dir+"/containerd.sock", "-id", id, "start")
	cmd.Dir, cmd.Env, cmd.Stdin = b.dir, []string{behaviour + "=serve", noRaceSleep}, strings.NewReader(string(stdin))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w", out, err)
	}
	if stdin != nil {
		var result bootapi.BootstrapResult
		if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 {
			b.t.Errorf("start answers %v, %v", &result, err)
		}
		return result.Address, nil
	}
	return string(out), nil
}

// parametersOf is what containerd 2.3 and later write to start's stdin.
func parametersOf(t *testing.T, containerd bundle, id string) []byte {
	t.Helper()
	return marshal(t, &bootapi.BootstrapParams{
		InstanceID: id, Namespace: "test", ContainerdGrpcAddress: containerd.dir + "/containerd.sock",
	})
}

// annotationsOf are those of a container in the pod "pod".
var annotationsOf = map[string]func(role string) string{
	"containerd": func(role string) string {
		return fmt.Sprintf(`"io.kubernetes.cri.container-type":%q,"io.kubernetes.cri.sandbox-id":"pod"`, role)
	},
	"CRI-O": func(role string) string {
		return fmt.Sprintf(`"io.kubernetes.cri-o.ContainerType":%q,"io.kubernetes.cri-o.SandboxID":"pod"`, role)
	},
	"the id alone": func(string) string { return `"io.kubernetes.cri.sandbox-id":"pod"` },
}

func TestMembersJoinTheirPod(t *testing.T) {
	for name, annotations := range annotationsOf {
		t.Run(name, func(t *testing.T) {
			first, second := newBundle(t, annotations("sandbox")), newBundle(t, annotations("container"))
			address, err := first.start(first, "pod", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer first.call(address, "end")
			for _, stdin := range [][]byte{nil, parametersOf(t, first, "c2")} {
				if got, err := second.start(first, "c2", stdin); err != nil || got != address {
					t.Errorf("a member's start: %q, %v, want %q", got, err, address)
				}
				// The member's end is not the pod's.
				if _, stderr, err := second.run("hold", nil, "-id", "c2", "delete"); err != nil || stderr != "" {
					t.Errorf("a member's delete: %v: %s", err, stderr)
				}
				first.call(address, "facts")
			}
		})
	}
}

func TestMembersOfADeadPod(t *testing.T) {
	for name, annotations := range annotationsOf {
		t.Run(name, func(t *testing.T) {
			first, second := newBundle(t, annotations("sandbox")), newBundle(t, annotations("container"))
			address, err := first.start(first, "pod", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := second.start(first, "c2", nil); err != nil {
				t.Fatal(err)
			}
			if err := killShim(first.dir); err != nil { // its socket is left
				t.Fatal(err)
			}
			for _, stdin := range [][]byte{nil, parametersOf(t, first, "c3")} {
				_, err := newBundle(t, annotations("container")).start(first, "c3", stdin)
				if err == nil || !strings.Contains(err.Error(), `the shim of its sandbox "pod" does not answer`) {
					t.Errorf("start of a member: %v", err)
				}
			}
			if hasDaemon(second.dir) {
				t.Error("a member has a shim")
			}
			// Whose delete comes first, nothing is left in the end.
			for _, b := range []bundle{second, first} {
				if _, stderr, err := b.run("hold", nil, "-id", "x", "delete"); err != nil || stderr != "" {
					t.Errorf("delete: %v: %s", err, stderr)
				}
			}
			if _, err := os.Stat(strings.TrimPrefix(address, "unix://")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the socket is left: %v", err)
			}
		})
	}
}

func TestStartRefusesNonsense(t *testing.T) {
	for annotations, want := range map[string]string{
		`"io.kubernetes.cri.container-type":"x"`:                                          "neither sandbox nor container",
		`"io.kubernetes.cri.container-type":"container"`:                                  "without io.kubernetes.cri.sandbox-id",
		`"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"p"`: "of another sandbox",
		`"a":1`: "decode the bundle's config.json",
	} {
		b := newBundle(t, annotations)
		if _, err := b.start(b, "c", nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", annotations, err, want)
		}
	}
}

// podBundle makes the bundle of a pod by the sandbox API.
func podBundle(t *testing.T, controller string) bundle {
	t.Helper()
	b := newBundle(t, "")
	if err := os.Remove(filepath.Join(b.dir, "config.json")); err != nil {
		t.Fatal(err)
	}
	b.dir = filepath.Join(b.dir, controller, "test", "pod")
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStartForTheSandboxAPI(t *testing.T) {
	for name, tt := range map[string]struct {
		controller, spec string
		parameters, json bool
	}{
		"2.4":             {controller: shimController, parameters: true},
		"2.4 with a spec": {controller: shimController, spec: `{"annotations":{"io.kubernetes.cri.sandbox-id":"other"}}`, parameters: true},
		"2.0":             {controller: shimController, json: true},
		"2.0 with a spec": {controller: shimController, spec: "nonsense", json: true},
		"1.7":             {controller: "io.containerd.sandbox.controller.v1.local", spec: `{}`},
		"another's":       {controller: "elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			b := podBundle(t, tt.controller)
			if tt.spec != "" {
				if err := os.WriteFile(filepath.Join(b.dir, "config.json"), []byte(tt.spec), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var stdin []byte
			if tt.parameters {
				stdin = parametersOf(t, b, "pod")
			}
			answer, err := b.start(b, "pod", stdin)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(filepath.Join(b.dir, "address"))
			if err != nil {
				t.Fatal(err)
			}
			want := string(raw)
			if tt.json {
				want = `{"version":3,"address":"` + string(raw) + `","protocol":"ttrpc"}`
			}
			if answer != want {
				t.Errorf("start answers %q, want %q", answer, want)
			}
			if f := b.call(string(raw), "facts"); !f.Hold || f.Bundle != b.dir {
				t.Errorf("the daemon says %+v", f)
			}
			// A client may annotate members as CRI does.
			member := newBundle(t, annotationsOf["containerd"]("container"))
			if got, err := member.start(b, "m", nil); err != nil || got != string(raw) {
				t.Errorf("a member's start: %q, %v", got, err)
			}
			// containerd gives up before CreateSandbox: nothing but the shim is there.
			pid, began, err := onRecord(b.dir)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, stderr, err := b.run("hold", nil, "-id", "pod", "-bundle", b.dir, "delete"); err != nil || stderr != "" {
					t.Errorf("delete: %v: %s", err, stderr)
				}
			}
			mustBeGone(t, pid, began)
			if _, err := os.Stat(strings.TrimPrefix(string(raw), "unix://")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the socket is left: %v", err)
			}
		})
	}
}

func mustBeGone(t *testing.T, pid int, began uint64) {
	t.Helper()
	// A zombie, which has not been waited for, is gone too.
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		defer unix.Close(fd) //nolint:errcheck // read only
		if now, err := child.StartTime(pid); err != nil || now != began {
			return
		}
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000); n != 1 {
			t.Errorf("the daemon lives on: %d, %v", n, err)
		}
	}
}

// A bundle made anew does not get the daemon of its predecessor, which knows
// another spec.
func TestStartDoesNotTakeAnothersDaemon(t *testing.T) {
	old := newBundle(t, "")
	address, err := old.start(old, "one", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer old.call(address, "end")
	if _, err := newBundle(t, "").start(old, "one", nil); err == nil || !strings.Contains(err.Error(), "is served by another shim") {
		t.Errorf("start: %v", err)
	}
	old.call(address, "facts")
}

// Nobody calls a daemon whose address did not reach containerd.
func TestStartThatCannotAnswerEndsTheDaemon(t *testing.T) {
	t.Run("containerd is gone", func(t *testing.T) {
		b := newBundle(t, "")
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close() //nolint:errcheck // nobody reads
		cmd := exec.Command("/proc/self/exe", "-namespace", "test", "-address", b.dir+"/containerd.sock", "-id", "one", "start")
		cmd.Dir, cmd.Env, cmd.Stdout = b.dir, []string{behaviour + "=serve", noRaceSleep}, w
		err = cmd.Run()
		w.Close() //nolint:errcheck // the child's is gone too
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("start: %v", err)
		}
		mustLeaveNothing(t, b)
	})
	t.Run("the bundle is gone", func(t *testing.T) {
		for _, as := range []string{"homeless", "murdered"} {
			b := newBundle(t, "")
			_, stderr, err := b.run(as, nil, "-id", "one", "start")
			if err == nil || !strings.Contains(stderr, "leave the shim's address in the bundle") {
				t.Errorf("start, with the daemon %s: %v: %s", as, err, stderr)
			}
			mustLeaveNothing(t, b)
		}
	})
}

func mustLeaveNothing(t *testing.T, b bundle) {
	t.Helper()
	path, err := socketPath(defaultSocketDir, b.dir+"/containerd.sock", "test", "one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if hasDaemon(b.dir) {
		t.Error("the daemon is on record")
	}
}

func TestDeleteOfABrokenRecord(t *testing.T) {
	b := newBundle(t, "")
	if err := os.WriteFile(filepath.Join(b.dir, pidFile), []byte("4711"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, err := b.run("hold", nil, "-id", "one", "delete"); err != nil || !strings.Contains(stderr, "find the shim on record") {
		t.Errorf("delete: %v: %s", err, stderr)
	}
	if err := os.WriteFile(filepath.Join(b.dir, pidFile), fmt.Appendf(nil, "%d 1\n", os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	// The pid is another process's by now: this one's.
	if _, stderr, err := b.run("hold", nil, "-id", "one", "delete"); err != nil || stderr != "" {
		t.Errorf("delete: %v: %s", err, stderr)
	}
}
