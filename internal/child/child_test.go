package child

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	sh      = "/bin/sh"
	timeout = 20 * time.Second
	roleEnv = "HUSK_TEST_CHILD_ROLE"
)

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) == "parent" {
		if err := parent(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(roleEnv) == "user" {
		if err := unix.Setresuid(-1, 65534, -1); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		status, err := os.ReadFile("/proc/thread-self/status")
		fmt.Println(string(status), err)
		return
	}
	os.Exit(m.Run())
}

// parent starts a child, says its pid and start time, and lives as long as it.
func parent() error {
	c, err := Start(Spec{Path: sh, Args: []string{"-c", "read forever <&3"}, ExtraFiles: []*os.File{os.Stdin}})
	if err != nil {
		return err
	}
	fmt.Println(c.PID(), c.StartTime())
	<-c.Done()
	return nil
}

func shell(t *testing.T, spec Spec, script string) *Child {
	t.Helper()
	if _, err := os.Stat(sh); err != nil {
		t.Skip("no ", sh)
	}
	spec.Path, spec.Args = sh, []string{"-c", script}
	c, err := Start(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Kill()
		wait(t, c)
	})
	return c
}

func wait(t *testing.T, c *Child) {
	t.Helper()
	select {
	case <-c.Done():
	case <-time.After(timeout):
		t.Fatalf("pid %d has not ended", c.PID())
	}
}

// pipe returns both ends, closed at the end of the test.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestStatusAndOutput(t *testing.T) {
	tests := map[string]struct {
		spec                  Spec
		script                string
		status, output, cause string
	}{
		"success":     {script: "exit 0", status: "exit status 0", cause: "exit status 0"},
		"exit status": {script: "echo a >&2; echo b; exit 3", status: "exit status 3", output: "a\nb\n", cause: "exit status 3: a; b"},
		"signal":      {script: "kill -ABRT $$", status: "killed by SIGABRT", cause: "killed by SIGABRT"},
		"escapes":     {script: `printf '\033[2J\377\n' >&2`, status: "exit status 0", output: "\\x1b[2J\\xff\n", cause: `exit status 0: \x1b[2J\xff`},
		"end of long output": {
			spec: Spec{StderrLimit: 6}, script: "printf 0123456789 >&2; printf ab >&2",
			status: "exit status 0", output: "6789ab", cause: "exit status 0: 6789ab",
		},
		"last lines only": {
			script: "printf '1\n2\n3\n\n4\n5\n6\n7\n'", status: "exit status 0",
			output: "1\n2\n3\n\n4\n5\n6\n7\n", cause: "exit status 0: 3; 4; 5; 6; 7",
		},
		"environment and directory": {
			spec: Spec{Env: []string{"A=b"}, Dir: "/"}, script: "echo $A $HOME $(pwd)",
			status: "exit status 0", output: "b /\n", cause: "exit status 0: b /",
		},
		"stdin is empty": {script: "read x || echo end", status: "exit status 0", output: "end\n", cause: "exit status 0: end"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := shell(t, tt.spec, tt.script)
			wait(t, c)
			if got := c.Status(); got != tt.status {
				t.Errorf("Status = %q, want %q", got, tt.status)
			}
			if got := c.Stderr(); got != tt.output {
				t.Errorf("Stderr = %q, want %q", got, tt.output)
			}
			if got := c.Cause(); got != tt.cause {
				t.Errorf("Cause = %q, want %q", got, tt.cause)
			}
			c.Kill() // after the end: nothing
			if err := c.Stop(t.Context(), syscall.SIGTERM); err != nil {
				t.Errorf("Stop after the end: %v", err)
			}
		})
	}
}

func TestCauseIsBounded(t *testing.T) {
	c := shell(t, Spec{}, "printf '%2000s' x")
	wait(t, c)
	if got := c.Cause(); len(got) > 700 || !strings.HasSuffix(got, " x") {
		t.Errorf("Cause has %d bytes and ends %q", len(got), got[len(got)-5:])
	}
}

func TestStartErrors(t *testing.T) {
	for name, spec := range map[string]Spec{
		"no such program":   {Path: "/nonexistent/program"},
		"no such directory": {Path: sh, Dir: "/nonexistent"},
		"not executable":    {Path: "/proc/self/status"},
	} {
		if c, err := Start(spec); err == nil || !strings.Contains(err.Error(), spec.Path) {
			t.Errorf("%s: Start = %v, %v; want an error that names the program", name, c, err)
		}
	}
}

func TestDescriptorsAreExact(t *testing.T) {
	r, w := pipe(t)
	// One that this process holds without close-on-exec, as if inherited.
	leak, err := unix.FcntlInt(r.Fd(), unix.F_DUPFD, 20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	c := shell(t, Spec{ExtraFiles: []*os.File{w, r}},
		`i=0; while [ $i -lt 100 ]; do [ -e /proc/$$/fd/$i ] && echo $i; i=$((i+1)); done; echo three >&3`)
	wait(t, c)
	if got := strings.Fields(c.Stderr()); !slices.Equal(got, []string{"0", "1", "2", "3", "4"}) {
		t.Errorf("descriptors = %q, want 0 to 4 and no other", got)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || line != "three\n" {
		t.Errorf("read from descriptor 3 = %q, %v", line, err)
	}
}

func TestNoNewPrivsIsPerChild(t *testing.T) {
	const script = "grep NoNewPrivs /proc/self/status"
	for range 3 { // alternately: the setting of one must not reach the next
		for spec, want := range map[bool]string{true: "1", false: "0"} {
			c := shell(t, Spec{NoNewPrivs: spec, Env: []string{"PATH=/usr/bin:/bin"}}, script)
			wait(t, c)
			if got := strings.Fields(c.Stderr()); len(got) != 2 || got[1] != want {
				t.Errorf("NoNewPrivs %v: %q, want %s", spec, got, want)
			}
		}
	}
}

func TestCredentialsAndNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	c := shell(t, Spec{
		UID: 65534, GID: 65533, Groups: []int{65532}, NoNewPrivs: true,
		Namespaces: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWNS,
		Env:        []string{"PATH=/usr/bin:/bin"},
	}, `id -u; id -g; id -G; echo $$; grep CapEff /proc/self/status; for n in net ipc pid uts mnt; do readlink /proc/self/ns/$n; done`)
	wait(t, c)
	got := strings.Fields(c.Stderr())
	want := []string{"65534", "65533", "65533", "65532", "1", "CapEff:", "0000000000000000"}
	if len(got) != len(want)+5 {
		t.Fatalf("output = %q", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("field %d = %q, want %q", i, got[i], want[i])
		}
	}
	for i, ns := range []string{"net", "ipc", "pid", "uts", "mnt"} {
		if own, err := os.Readlink("/proc/self/ns/" + ns); err != nil || own == got[len(want)+i] {
			t.Errorf("%s namespace is %s, this process's own (%v)", ns, own, err)
		}
	}
}

func TestRootWithoutCapabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for range 2 { // alternately: one child's lack must not reach the next
		for _, none := range []bool{true, false} {
			c := shell(t, Spec{NoCapabilities: none, Env: []string{"PATH=/usr/bin:/bin"}}, `id -u; grep -E "Cap(Inh|Prm|Eff|Bnd|Amb)" /proc/self/status`)
			wait(t, c)
			got := strings.Fields(c.Stderr())
			if len(got) != 11 || got[0] != "0" {
				t.Fatalf("output = %q", got)
			}
			var some bool
			for i := 2; i < len(got); i += 2 {
				some = some || strings.Trim(got[i], "0") != ""
			}
			if some == none {
				t.Errorf("NoCapabilities %v: %q", none, got)
			}
		}
	}
}

// What a child may not inherit: its memory is a guest's, and so is its appetite.
func TestNoCoreAndNoProtectionFromOOM(t *testing.T) {
	const own = "/proc/self/oom_score_adj"
	score, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, []byte("-1"), 0); err != nil {
		t.Logf("without protection from the OOM killer: %v", err)
	} else {
		defer os.WriteFile(own, score, 0) //nolint:errcheck // as it was
	}
	r, _ := pipe(t)
	c := shell(t, Spec{ExtraFiles: []*os.File{r}}, "read forever <&3")
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", c.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && (f[4] != "0" || f[5] != "0") {
			t.Errorf("limits: %q", line)
		}
	}
	got, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", c.PID()))
	if err != nil || strings.HasPrefix(string(got), "-") {
		t.Errorf("oom_score_adj is %q, %v", got, err)
	}
}

func TestStop(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	tests := map[string]struct {
		script string
		ctx    context.Context
		status string
	}{
		"by the signal":       {"trap 'exit 7' TERM; echo >&3; read x <&4", t.Context(), "exit status 7"},
		"ctx ended: killed":   {"trap '' TERM; echo >&3; read x <&4", ended, "killed by SIGKILL"},
		"no handler: signal":  {"echo >&3; read x <&4", t.Context(), "killed by SIGTERM"},
		"ctx ends in waiting": {"trap '' TERM; echo >&3; read x <&4; read x <&4", nil, "killed by SIGKILL"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ready, readyW := pipe(t)
			block, _ := pipe(t)
			c := shell(t, Spec{ExtraFiles: []*os.File{readyW, block}}, tt.script)
			if _, err := ready.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if got := c.Status(); got != "running" {
				t.Errorf("Status = %q before the end", got)
			}
			ctx := tt.ctx
			if ctx == nil {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
			}
			for range 2 {
				if err := c.Stop(ctx, syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			if got := c.Status(); got != tt.status {
				t.Errorf("Status = %q, want %q", got, tt.status)
			}
		})
	}
}

// A grandchild that holds stderr must not keep Done open.
func TestDoneDespiteHeldOutput(t *testing.T) {
	block, w := pipe(t)
	c := shell(t, Spec{ExtraFiles: []*os.File{block}}, "echo last words; (read x <&3) & exit 4")
	wait(t, c)
	if got := c.Cause(); got != "exit status 4: last words" {
		t.Errorf("Cause = %q", got)
	}
	w.Close() // ends the grandchild
}

// The child lives on when the goroutine and thread that called Start are gone.
func TestOutlivesCallersThread(t *testing.T) {
	r, w := pipe(t)
	back, backW := pipe(t)
	var c *Child
	tid := make(chan int)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends
		c = shell(t, Spec{ExtraFiles: []*os.File{r, backW}}, "read line <&3; echo $line >&4")
		tid <- unix.Gettid()
	}()
	task := filepath.Join("/proc/self/task", strconv.Itoa(<-tid))
	for end := time.Now().Add(timeout); ; runtime.Gosched() {
		if _, err := os.Stat(task); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Skip("the caller's thread has not ended")
		}
	}
	if _, err := io.WriteString(w, "alive\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(back).ReadString('\n'); err != nil || line != "alive\n" {
		t.Errorf("answer = %q, %v", line, err)
	}
	wait(t, c)
}

// startParent runs this test binary as a parent of a child, and returns the
// parent, a pidfd of the child, and the child's record.
func startParent(t *testing.T) (cmd *exec.Cmd, pidfd *os.File, pid int, start uint64) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=parent")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe() // its other end keeps the child waiting
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if _, err := fmt.Fscan(stdout, &pid, &start); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	pidfd = os.NewFile(uintptr(fd), "pidfd")
	t.Cleanup(func() { pidfd.Close() })
	return cmd, pidfd, pid, start
}

func TestDiesWithParent(t *testing.T) {
	cmd, pidfd, _, _ := startParent(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := waitPidfd(pidfd, timeout); err != nil {
		t.Errorf("the child outlives its parent: %v", err)
	}
}

func TestKillRecorded(t *testing.T) {
	_, pidfd, pid, start := startParent(t)
	if got, err := StartTime(pid); err != nil || got != start {
		t.Errorf("StartTime = %d, %v; the record says %d", got, err, start)
	}
	if err := KillRecorded(pid, start+1); err != nil {
		t.Errorf("another process with the pid: %v", err)
	}
	if err := waitPidfd(pidfd, time.Millisecond); err == nil {
		t.Fatal("killed a process with another start time")
	}
	for range 2 {
		if err := KillRecorded(pid, start); err != nil {
			t.Errorf("KillRecorded: %v", err)
		}
	}
	if err := waitPidfd(pidfd, time.Millisecond); err != nil {
		t.Errorf("not killed: %v", err)
	}
	for _, pid := range []int{-1, 0, 1} {
		if err := KillRecorded(pid, 1); err == nil {
			t.Errorf("KillRecorded(%d) succeeded", pid)
		}
	}
	if err := KillRecorded(os.Getpid(), 0); err == nil {
		t.Error("KillRecorded without a start time succeeded")
	}
}

func TestParseStartTime(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
	for stat, want := range map[string]uint64{
		"12 (sh)" + rest:             4711,
		"12 (a) R 1 (b c)" + rest:    4711,
		"12 (sh) S 1 2":              0,
		"":                           0,
		"12 (sh)" + rest[:43] + " x": 0,
	} {
		got, err := parseStartTime(stat)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("parseStartTime(%q) = %d, %v; want %d", stat, got, err, want)
		}
	}
}

// What a child with the ids of a user may do is its own matter, not its parent's.
func TestKeepCapabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	for keep, want := range map[bool]bool{true: false, false: true} {
		c, err := Start(Spec{Path: "/proc/self/exe", Env: []string{roleEnv + "=user"}, KeepCapabilities: keep})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-c.Done():
		case <-time.After(timeout):
			c.Kill()
			t.Fatal("the child has not ended")
		}
		if got := strings.Contains(c.Stderr(), "CapEff:\t0000000000000000\n"); got != want || c.Status() != "exit status 0" {
			t.Errorf("child with KeepCapabilities %t: %s", keep, c.Cause())
		}
	}
}
