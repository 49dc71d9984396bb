// Package e2e tests the whole of Husk on real parts: private containerds, real
// virtual machines, real containers. It needs root and runs where -containerd
// names a generation; `make e2e` does.
package e2e

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

var (
	containerdFlag = flag.String("containerd", "", "comma-separated `generations` of containerd to test with: 1.6, 2.4")
	runtimeFlag    = flag.String("runtime", "io.containerd.husk.v2", "containerd `runtime` under test; runc's checks the tests themselves")
	rootFlag       = flag.String("root", "", "the repository's root `directory`; found from the working directory if empty")
	longFlag       = flag.Bool("long", false, "do what takes many minutes, too")
	scratchFlag    = flag.String("scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
)

func TestMain(m *testing.M) {
	daemon.Supervise()
	flag.Parse()
	if *containerdFlag == "" {
		fmt.Println("end-to-end tests need root and -containerd=1.6,2.4; run `make e2e`")
		return
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "end-to-end tests need root")
		os.Exit(1)
	}
	before := staleSockets()
	code := m.Run()
	for path := range staleSockets() {
		if !before[path] {
			fmt.Printf("leftover: socket %s\n", path)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// shimSockets is where containerd's shims listen, whatever the daemon's own
// directories are: containerd builds the path in.
const shimSockets = "/run/containerd/s/*"

// staleSockets is the set of shim sockets that nobody listens on, in whichever
// network namespace.
func staleSockets() map[string]bool {
	stale := map[string]bool{}
	paths, _ := filepath.Glob(shimSockets) // the pattern is a constant and well-formed
	for _, path := range paths {
		conn, err := net.Dial("unix", path)
		switch {
		case err == nil:
			conn.Close()
		case errors.Is(err, unix.ECONNREFUSED):
			stale[path] = true
		}
	}
	return stale
}

// generations are the containerds that -containerd names.
func generations(t *testing.T, root string) []daemon.Generation {
	t.Helper()
	var list []daemon.Generation
	for name := range strings.SplitSeq(*containerdFlag, ",") {
		g, err := daemon.Lookup(root, name)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, g)
	}
	return list
}

// repository is the root of the source tree.
func repository(t *testing.T) string {
	t.Helper()
	if *rootFlag != "" {
		return *rootFlag
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("find the repository: no go.mod above the working directory; use -root")
	return ""
}

// each runs a test for every generation of containerd, in parallel.
func each(t *testing.T, test func(e *env)) {
	t.Helper()
	t.Parallel()
	root := repository(t)
	for _, g := range generations(t, root) {
		t.Run("containerd-"+g.Name, func(t *testing.T) {
			t.Parallel()
			test(newEnv(t, root, g))
		})
	}
}

// eachHusk is each for what runc has no counterpart of.
func eachHusk(t *testing.T, test func(e *env)) {
	t.Helper()
	if !strings.Contains(*runtimeFlag, "husk") {
		t.Skipf("%s has no virtual machine", *runtimeFlag)
	}
	each(t, test)
}

// lines splits text into its lines without surrounding space.
func lines(text string) []string {
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(s string) bool { return s == "" })
}
