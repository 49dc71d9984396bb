// Package cri tests pods from end to end: a CRI client, which is what a kubelet
// is, private containerds with Debian's CNI plugins, real virtual machines. It
// is a module of its own, so that what it needs never touches Husk's.
//
// It needs root, `make deps guest containerd-2.4`, and runs where -containerd
// names a generation:
//
//	cd test/cri && go test . -count=1 -parallel 2 -containerd=1.6,2.4 -handler husk,husk-shim
//
// -handler runc checks the tests themselves: each that does not speak of virtual
// machines has to pass there. -long adds those that take minutes. -smoke adds one
// for the rig, and gives all of them more time.
//
// Everything is private to a test: containerd's directories, its sockets, and
// the node's network namespace, in which containerd, bridges and the hosts' ends
// of pods' interfaces are. Each test ends with a look for what is left.
package cri

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/husk-containers/husk/test/daemon"
)

var (
	containerdFlag = flag.String("containerd", "", "comma-separated `generations` of containerd to test with: 1.6, 2.4")
	handlerFlag    = flag.String("handler", "husk,husk-shim", "comma-separated CRI runtime `handlers` under test; runc checks the tests themselves")
	longFlag       = flag.Bool("long", false, "run also the tests that take minutes")
	smokeFlag      = flag.Bool("smoke", false, "want KVM, vhost-vsock, vhost-net and cgroup v2 in use, on a host several times slower than others")
	rootFlag       = flag.String("root", "", "the repository's root `directory`; found from the working directory if empty")
	scratchFlag    = flag.String("scratch", "", "short `directory` on a file system that carries an overlay; /tmp if empty")
)

func TestMain(m *testing.M) {
	servePlugin()
	daemon.Supervise()
	flag.Parse()
	if *containerdFlag == "" {
		fmt.Println("tests of pods need root and -containerd=1.6,2.4; run `make e2e`")
		return
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "tests of pods need root")
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

// staleSockets is the set of shim sockets that nobody listens on, in whatever
// network namespace.
func staleSockets() map[string]bool {
	stale := map[string]bool{}
	paths, _ := filepath.Glob(shimSockets) // the pattern is a constant and well-formed
	for _, path := range paths {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			stale[path] = true
		}
	}
	return stale
}

// repository is the root of the source tree.
func repository(t *testing.T) string {
	t.Helper()
	if *rootFlag != "" {
		return *rootFlag
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "configuration.toml")); err != nil {
		t.Fatalf("find the repository two directories up: %v; use -root", err)
	}
	return root
}

// A setup is what a test wants other than usual.
type setup struct {
	// networks of CNI; nil: one that bridges v4 and v6.
	networks []string
	// husk is for what runc has no counterpart of.
	husk bool
	// tasks is for what goes by the task API alone, however the pod was made, and once for
	// what does not depend on containerd either: with -long they run every way.
	tasks, once bool
}

// leaves tells whether a way to run the test would show nothing new.
func (s setup) leaves(generation, handler string) bool {
	switch {
	case *longFlag:
		return false
	case s.once && generation == "1.6" && strings.Contains(*containerdFlag, "2.4"):
		return true
	}
	return (s.tasks || s.once) && handler == "husk-shim" && strings.Contains(*handlerFlag, "husk,")
}

// each runs a test for every containerd and every handler, in parallel.
func each(t *testing.T, s setup, test func(e *env)) {
	t.Helper()
	t.Parallel()
	root := repository(t)
	handlers := strings.Split(*handlerFlag, ",")
	if s.husk {
		handlers = slices.DeleteFunc(handlers, func(h string) bool { return h == "runc" })
		if len(handlers) == 0 {
			t.Skip("runc has no virtual machine")
		}
	}
	for generation := range strings.SplitSeq(*containerdFlag, ",") {
		for _, handler := range handlers {
			if handler == "husk-shim" && generation == "1.6" {
				continue // it knows no sandbox API
			}
			if s.leaves(generation, handler) {
				continue
			}
			t.Run("containerd-"+generation+"/"+handler, func(t *testing.T) {
				t.Parallel()
				g, err := daemon.Lookup(root, generation)
				if err != nil {
					t.Fatal(err)
				}
				test(newEnv(t, root, g, handler, s))
			})
		}
	}
}
