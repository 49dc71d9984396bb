package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// The test's program behaves as this variable says when it is run as the shim.
const behaviour = "HUSK_TEST_BEHAVIOUR"

// noRaceSleep keeps the race detector from waiting at the end of each process.
const noRaceSleep = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	if b := os.Getenv(behaviour); b != "" {
		spawn := func(bundle string, daemon *exec.Cmd) error {
			if b == "misplaced" {
				return fmt.Errorf("there is no place for %s", bundle)
			}
			return daemon.Start()
		}
		os.Exit(Program{Name: "test", Serve: serveAs(b), Spawn: spawn, Cleanup: func(_ context.Context, bundle string) error {
			switch b {
			case "dirty":
				return errors.New("two\nlines")
			case "hold":
				return nil // nothing is on record
			}
			return os.Remove(filepath.Join(bundle, "resource"))
		}}.Run())
	}
	os.Exit(m.Run())
}

// facts is what the test's daemon says of itself.
type facts struct {
	PID, Session              int
	Bundle, MountNS, Config   string
	Events, Propagation, Null string
	Debug, Hold               bool
}

func serveAs(b string) func(context.Context, *Daemon) error {
	return func(ctx context.Context, d *Daemon) error {
		switch b {
		case "fail":
			return errors.New("the kernel is missing\nand so is the initrd")
		case "panic":
			panic("at once")
		case "die":
			os.Exit(3)
		}
		slog.Info("begun")
		if b == "homeless" || b == "murdered" {
			if err := os.RemoveAll(d.Bundle); err != nil {
				return err
			}
		}
		context.AfterFunc(ctx, func() { d.Listener.Close() }) //nolint:errcheck // Accept tells
		if err := d.Ready(); err != nil {
			return err
		}
		if b == "murdered" {
			return unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		for {
			conn, err := d.Listener.Accept()
			if err != nil {
				return err
			}
			var word string
			fmt.Fscan(conn, &word) //nolint:errcheck // a probe says nothing
			if word == "end" {
				slog.Debug("ended")
				return conn.Close()
			}
			f := facts{PID: os.Getpid(), Bundle: d.Bundle, Config: d.ConfigPath, Events: d.EventsPath, Hold: d.Hold, Debug: d.Level.Level() == slog.LevelDebug}
			f.Session, _ = unix.Getsid(0)
			f.MountNS, _ = os.Readlink("/proc/self/ns/mnt")
			f.Null, _ = os.Readlink("/proc/self/fd/0")
			if mi, err := os.ReadFile("/proc/self/mountinfo"); err == nil && bytes.Contains(mi, []byte(" / / ")) {
				f.Propagation = string(mi)
			}
			json.NewEncoder(conn).Encode(f) //nolint:errcheck // the test sees it
			conn.Close()                    //nolint:errcheck // likewise
		}
	}
}

type bundle struct {
	t   *testing.T
	dir string
}

// newBundle makes a bundle as containerd does.
func newBundle(t *testing.T, annotations string) bundle {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("start makes a mount namespace: needs root")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"annotations":{`+annotations+`}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return bundle{t, dir}
}

// run runs the shim's program in the bundle.
func (b bundle) run(as string, stdin []byte, args ...string) (stdout, stderr string, err error) {
	b.t.Helper()
	cmd := exec.Command("/proc/self/exe", append([]string{"-namespace", "test", "-address", b.dir + "/containerd.sock"}, args...)...)
	cmd.Dir = b.dir
	cmd.Env = []string{behaviour + "=" + as, "TTRPC_ADDRESS=" + b.dir + "/events.sock", noRaceSleep}
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// call asks the daemon at address.
func (b bundle) call(address, word string) facts {
	b.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // read to its end
	fmt.Fprintln(conn, word)
	var f facts
	if err := json.NewDecoder(conn).Decode(&f); err != nil && !errors.Is(err, io.EOF) {
		b.t.Fatal(err)
	}
	return f
}

func TestStartLeavesADaemon(t *testing.T) {
	b := newBundle(t, "")
	if err := unix.Mkfifo(filepath.Join(b.dir, "log"), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(b.dir, "log"), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // read only
	address, stderr, err := b.run("serve", nil, "-id", "one", "-debug", "start")
	if err != nil || stderr != "" {
		t.Fatalf("start: %v: %s", err, stderr)
	}
	pidfd := -1
	f := b.call(address, "facts")
	if pidfd, err = unix.PidfdOpen(f.PID, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd) //nolint:errcheck // read only
	ours, _ := os.Readlink("/proc/self/ns/mnt")
	if f.Session != f.PID || f.MountNS == ours || f.Null != "/dev/null" || f.Bundle != b.dir || !f.Debug || f.Events != b.dir+"/events.sock" {
		t.Errorf("the daemon says %+v", f)
	}
	root := ""
	for line := range strings.SplitSeq(f.Propagation, "\n") {
		if fields := strings.Fields(line); len(fields) > 6 && fields[4] == "/" {
			root = line
		}
	}
	if !strings.Contains(root, "shared:") {
		t.Errorf("the daemon's root mount is not shared with the namespaces of its children: %s", root)
	}
	if got, _ := os.ReadFile(filepath.Join(b.dir, "address")); string(got) != address {
		t.Errorf("address file: %q, want %q", got, address)
	}
	if got, _, err := onRecord(b.dir); err != nil || got != f.PID {
		t.Errorf("on record: %d, %v, want %d", got, err, f.PID)
	}
	again, _, err := b.run("serve", nil, "-id", "one", "start")
	if err != nil || again != address {
		t.Errorf("start beside a daemon: %q, %v, want %q", again, err, address)
	}

	b.call(address, "end")
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 10_000); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(strings.TrimPrefix(address, "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if hasDaemon(b.dir) {
		t.Error("the daemon is left on record")
	}
	buf := make([]byte, 4096)
	n, _ := log.Read(buf)
	for _, want := range []string{"level=info msg=begun sandbox=one", "level=debug msg=ended"} {
		if !strings.Contains(string(buf[:n]), want) {
			t.Errorf("the log lacks %q: %s", want, buf[:n])
		}
	}
}

func TestStartTellsWhyTheDaemonFailed(t *testing.T) {
	for as, want := range map[string]string{
		"fail":  "the kernel is missing; and so is the initrd",
		"panic": "panic: at once",
		"die":   "the shim's daemon ended before it was ready: exit status 3",
		// It was not started.
		"misplaced": "spawn the shim's daemon: there is no place for /",
	} {
		t.Run(as, func(t *testing.T) {
			b := newBundle(t, "")
			if err := os.WriteFile(filepath.Join(b.dir, "resource"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, err := b.run(as, nil, "-id", "one", "start")
			if err == nil || stdout != "" || !strings.HasPrefix(stderr, want) {
				t.Errorf("start: %v, stdout %q, stderr %q, want %q", err, stdout, stderr, want)
			}
			if _, err := os.Stat(filepath.Join(b.dir, "address")); err == nil {
				t.Error("an address is left")
			}
			if _, err := os.Stat(filepath.Join(b.dir, "resource")); err == nil {
				t.Error("what was made for the daemon is left")
			}
			path, _ := socketPath(defaultSocketDir, b.dir+"/containerd.sock", "test", "one")
			if _, err := os.Stat(path); err == nil {
				t.Error("a socket is left")
			}
		})
	}
}

func TestDelete(t *testing.T) {
	b := newBundle(t, "")
	path := filepath.Join(b.dir, "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"address": "unix://" + path, InitPIDFile: "4711", "resource": ""} {
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(as, wantStderr string, wantPID uint32) {
		t.Helper()
		stdout, stderr, err := b.run(as, nil, "-id", "one", "-bundle", b.dir, "delete")
		var resp task.DeleteResponse
		if err != nil || proto.Unmarshal([]byte(stdout), &resp) != nil || stderr != wantStderr {
			t.Fatalf("delete: %v, stderr %q, want %q", err, stderr, wantStderr)
		}
		if resp.Pid != wantPID || resp.ExitStatus != 137 || resp.ExitedAt == nil {
			t.Errorf("delete answers %v", &resp)
		}
	}
	check("serve", "", 4711)
	if _, err := os.Stat(filepath.Join(b.dir, "resource")); err == nil {
		t.Error("Cleanup was not called with the bundle")
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket of a living shim is gone: %v", err)
	}
	l.Close() //nolint:errcheck // its process has died, as it were
	check("dirty", "two; lines\n", 4711)
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket of a dead shim is left")
	}
	for _, f := range []string{"address", InitPIDFile} {
		os.Remove(filepath.Join(b.dir, f)) //nolint:errcheck // the next check sees it
	}
	check("dirty", "two; lines\n", 0)
}

func TestInfoAndVersion(t *testing.T) {
	given := options(t, optionsType, &types.RuntimeInfo{})
	var out bytes.Buffer
	if err := (Program{Name: "io.containerd.husk.v2"}).printInfo(bytes.NewReader(marshal(t, given)), &out); err != nil {
		t.Fatal(err)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out.Bytes(), &info); err != nil {
		t.Fatal(err)
	}
	if info.Name != "io.containerd.husk.v2" || info.Version.GetVersion() == "" || !proto.Equal(info.Options, given) {
		t.Errorf("info: %v", &info)
	}
	out.Reset()
	if err := (Program{}).printVersion(&out); err != nil || !strings.Contains(out.String(), "Go version: go1.") {
		t.Errorf("version: %v: %s", err, &out)
	}
}

func TestLogNeverBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd) //nolint:errcheck // read only
	l := &logPipe{fd: fd}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 100 { // more than the FIFO holds
		if _, err := l.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	dropped := l.dropped.Load()
	if dropped == 0 {
		t.Fatal("nothing was dropped: the FIFO holds more than this test thinks")
	}
	if _, err := unix.Read(fd, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	slog.New(l.handler(slog.LevelInfo)).Warn("back")
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(buf[:n]); !strings.Contains(got, fmt.Sprintf("lines=%d\n", dropped)) || !strings.Contains(got, "level=warn msg=back") {
		t.Errorf("the log says %q", got)
	}
}
