package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
)

func TestStdinReachesTheContainerAndEnds(t *testing.T) {
	each(t, func(e *env) {
		r := e.feed([]byte("one\ntwo\n"), e.shArgs("cat", "echo ready; cat; echo end")...)
		if r.stdout != "one\ntwo\nend\n" || r.code != 0 {
			e.Errorf("%v", r)
		}
	})
}

func TestTwentyMiBThroughCat(t *testing.T) {
	each(t, func(e *env) {
		data := noise(20 << 20)
		e.compare("through cat", e.feed(data, e.shArgs("cat", "echo ready; exec cat")...), data)
		r := e.feed(data, e.shArgs("sum", "echo ready; exec sha256sum")...)
		if want := fmt.Sprintf("%x  -\n", sha256.Sum256(data)); r.stdout != want {
			e.Errorf("into the container: %v, want %q", r, want)
		}
	})
}

func TestOutputBeforeTheExitIsNotLost(t *testing.T) {
	each(t, func(e *env) {
		var want bytes.Buffer
		for i := range 1_000_000 {
			fmt.Fprintln(&want, i+1)
		}
		e.compare("seq, then exit", e.sh("exec seq 1000000"), want.Bytes())
	})
}

func TestOutputOnBothStreamsAtOnce(t *testing.T) {
	each(t, func(e *env) {
		r := e.sh("seq 100000 & seq 100000 >&2; wait")
		var want bytes.Buffer
		for i := range 100_000 {
			fmt.Fprintln(&want, i+1)
		}
		e.compare("stdout", r, want.Bytes())
		e.compare("stderr", result{stdout: r.stderr}, want.Bytes())
	})
}

func TestExec(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("exec", "sleep 1000", "--env", "FROM=container")
		r := e.exec(id, "code", "sh", "-c", "echo out; echo err >&2; exit 7")
		if r.stdout != "out\n" || r.stderr != "err\n" || r.code != 7 {
			e.Errorf("exit code: %v", r)
		}
		r = e.feed([]byte("in\n"), e.execArgs(id, "stdin", "sh", "-c", "echo ready; cat")...)
		if r.stdout != "in\n" || r.code != 0 {
			e.Errorf("stdin: %v", r)
		}
		if r = e.exec(id, "env", "sh", "-c", "echo $FROM"); r.stdout != "container\n" {
			e.Errorf("environment: %v", r)
		}
		r = e.ctr("task", "exec", "--exec-id", "cwd", "--cwd", "/etc", "--user", "daemon", id, "sh", "-c", "pwd; id -un")
		if r.stdout != "/etc\ndaemon\n" {
			e.Errorf("cwd and user: %v", r)
		}
	})
}

func TestExecInParallel(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("exec", "sleep 1000")
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				name := fmt.Sprintf("e%d", i)
				data := noise(1 << 20)
				r := e.feed(data, e.execArgs(id, name, "sh", "-c", fmt.Sprintf("echo ready; cat; exit %d", i))...)
				if r.code != i {
					e.Errorf("%s: exit code %d", name, r.code)
				}
				r.code = 0
				e.compare(name, r, data)
			})
		}
		wg.Wait()
	})
}

// compare wants success and these bytes, without printing megabytes.
func (e *env) compare(what string, r result, want []byte) {
	e.Helper()
	if r.code != 0 {
		e.Errorf("%s: exit code %d, stderr %.1000q", what, r.code, r.stderr)
	}
	if got := []byte(r.stdout); !bytes.Equal(got, want) {
		same := 0
		for same < min(len(got), len(want)) && got[same] == want[same] {
			same++
		}
		e.Errorf("%s: got %d bytes with SHA-256 %x, want %d with %x; the first %d are the same", what,
			len(got), sha256.Sum256(got), len(want), sha256.Sum256(want), same)
	}
}

// noise is n bytes that do not compress and are the same each time.
func noise(n int) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(data) // never fails
	return data
}
