package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// maxStdin bounds what is read from the caller, in bytes.
const maxStdin = 10 << 20

// A Program is a shim's program.
type Program struct {
	// Name is the runtime's, such as io.containerd.husk.v2.
	Name string
	// Serve runs the daemon until containerd has no more use for it or ctx ends.
	// It calls d.Ready once it can be called; an error before that is what
	// containerd's client is told.
	Serve func(ctx context.Context, d *Daemon) error
	// Spawn starts the daemon of a container in a bundle, where that belongs on the
	// host. What it made there is the daemon's to take back, and Cleanup's after an
	// error.
	Spawn func(bundle string, daemon *exec.Cmd) error
	// Cleanup takes back whatever a dead daemon may have left of the bundle.
	Cleanup func(ctx context.Context, bundle string) error
}

// Run is the program's main: it does what the command line says and returns the
// exit code. It is called once, and first.
func (p Program) Run() int {
	err := p.run(os.Args[1:])
	if err == nil {
		return 0
	}
	if !errors.Is(err, errTold) {
		// containerd puts its own words after it, on the same line.
		fmt.Fprint(os.Stderr, oneLine(err)) //nolint:errcheck // nothing else could tell
	}
	return 1
}

// errTold is the error of a daemon that has told why it ends.
var errTold = errors.New("told before")

// oneLine is the text of err, joined errors in one line.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

func (p Program) run(args []string) error {
	req, err := parseArgs(args, os.Getenv)
	switch {
	case err != nil:
		return err
	case req.version:
		return p.printVersion(os.Stdout)
	case req.info:
		return p.printInfo(os.Stdin, os.Stdout)
	case req.action == "start":
		return p.start(req, os.Stdin, os.Stdout)
	case req.action == "delete":
		return p.delete(req, os.Stdout)
	}
	return p.daemon(req)
}

// build returns the version and revision that the program was built from.
func build() (version, revision string) {
	version, revision = "unknown", "unknown"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return version, revision
	}
	if v := info.Main.Version; v != "" {
		version = v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return version, revision
}

func (p Program) printVersion(w io.Writer) error {
	version, revision := build()
	_, err := fmt.Fprintf(w, "%s:\n  Version:    %s\n  Revision:   %s\n  Go version: %s\n",
		filepath.Base(os.Args[0]), version, revision, runtime.Version())
	return err
}

// printInfo answers containerd's question about the runtime: what it is and what it
// can. The options come back as they were given.
func (p Program) printInfo(r io.Reader, w io.Writer) error {
	raw, err := io.ReadAll(io.LimitReader(r, maxStdin))
	if err != nil {
		return fmt.Errorf("read runtime options: %w", err)
	}
	version, revision := build()
	info := &types.RuntimeInfo{Name: p.Name, Version: &types.RuntimeVersion{Version: version, Revision: revision}}
	if len(raw) > 0 {
		info.Options = &anypb.Any{}
		if err := proto.Unmarshal(raw, info.Options); err != nil {
			return fmt.Errorf("decode runtime options: %w", err)
		}
	}
	if info.Features, err = encodeFeatures(); err != nil {
		return fmt.Errorf("encode runtime features: %w", err)
	}
	out, err := proto.Marshal(info)
	if err != nil {
		return fmt.Errorf("encode runtime info: %w", err)
	}
	_, err = w.Write(out)
	return err
}
