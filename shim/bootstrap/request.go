package bootstrap

import (
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// defaultSocketDir is where containerd of every generation has its shims'
// sockets: short, because a socket's path is.
const defaultSocketDir = "/run/containerd/s"

// A dialect is how a generation of containerd talks to a shim's start.
type dialect int

const (
	// plain is that of containerd 1.6 to 2.2: the runtime's options as an Any
	// on stdin, or nothing; the answer is the address. (1.7 to 2.2 also take a
	// JSON answer, which 1.6 takes for an address; what they call us with does
	// not tell 1.7 from 2.2.)
	plain dialect = iota
	// encoded is that of containerd 2.0 to 2.2 for a pod by the sandbox API: the
	// answer is JSON. By its version containerd learns that members of the pod need
	// no start, by which those that are not CRI's could not say where they belong.
	encoded
	// parameters is that of containerd 2.3 and later: a BootstrapParams on
	// stdin, answered by a BootstrapResult.
	parameters
)

// A request is what the program was asked to do.
type request struct {
	action    string // start, delete, or nothing: be the daemon
	version   bool
	info      bool
	debug     bool
	namespace string
	id        string
	bundle    string
	// containerd is its gRPC address; sockets of two containerds differ by it.
	containerd string
	// ttrpc is where containerd takes events.
	ttrpc string
	// config names a configuration file; empty: the default one.
	config string
	// hold is set for a pod by the sandbox API.
	hold bool
	// socket is the address that a daemon serves.
	socket string

	dialect   dialect
	socketDir string
	options   *anypb.Any
}

// parseArgs reads a command line. Flags of containerd's that have no meaning
// here are accepted.
func parseArgs(args []string, getenv func(string) string) (request, error) {
	r := request{ttrpc: getenv("TTRPC_ADDRESS"), socketDir: defaultSocketDir}
	f := flag.NewFlagSet("containerd-shim", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.BoolVar(&r.version, "v", false, "")
	f.BoolVar(&r.version, "version", false, "")
	f.BoolVar(&r.info, "info", false, "")
	f.BoolVar(&r.debug, "debug", false, "")
	f.StringVar(&r.namespace, "namespace", "", "")
	f.StringVar(&r.id, "id", "", "")
	f.StringVar(&r.bundle, "bundle", "", "")
	f.StringVar(&r.containerd, "address", "", "")
	f.StringVar(&r.socket, "socket", "", "")
	f.StringVar(&r.config, "config", "", "")
	f.BoolVar(&r.hold, "hold", false, "")
	f.String("publish-binary", "", "")
	f.String("debug-socket", "", "")
	if err := f.Parse(args); err != nil {
		return request{}, fmt.Errorf("parse arguments: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if r.version || r.info {
		return r, nil
	}
	r.action = f.Arg(0)
	switch {
	case r.action != "" && r.action != "start" && r.action != "delete":
		return request{}, fmt.Errorf("parse arguments: unknown action %q, known are start and delete: %w", r.action, errdefs.ErrInvalidArgument)
	case r.namespace == "" || r.id == "":
		return request{}, fmt.Errorf("parse arguments: -namespace and -id are needed: this program is run by containerd: %w", errdefs.ErrInvalidArgument)
	case r.action == "" && r.socket == "":
		return request{}, fmt.Errorf("parse arguments: an action is needed, start or delete: this program is run by containerd: %w", errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// readParameters takes in what containerd wrote to start's stdin.
func (r *request) readParameters(stdin []byte) error {
	// The first two fields of an Any and of a BootstrapParams are alike on the
	// wire; those of the latter repeat the command line.
	var params bootapi.BootstrapParams
	if err := proto.Unmarshal(stdin, &params); err == nil && params.InstanceID == r.id && params.Namespace == r.namespace {
		r.dialect = parameters
		if dir := params.GetSocketDir(); dir != "" {
			r.socketDir = filepath.Clean(dir)
		}
		if a := params.ContainerdGrpcAddress; a != "" {
			r.containerd = a
		}
		if a := params.ContainerdTtrpcAddress; a != "" {
			r.ttrpc = a
		}
		r.debug = r.debug || params.LogLevel <= bootapi.LogLevel_LOG_LEVEL_DEBUG
		for _, e := range params.Extensions {
			if isOptions(e.GetValue()) {
				r.options = e.Value
			}
		}
		return r.readOptions()
	}
	if len(stdin) == 0 {
		return nil
	}
	r.options = &anypb.Any{}
	if err := proto.Unmarshal(stdin, r.options); err != nil {
		return fmt.Errorf("decode runtime options from stdin: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if r.options.TypeUrl != "" && !isOptions(r.options) {
		return fmt.Errorf("runtime options are of type %q: give %s, or none: %w", r.options.TypeUrl, optionsType, errdefs.ErrInvalidArgument)
	}
	return r.readOptions()
}

// answer is what start prints for the shim at address.
func (r *request) answer(address string) ([]byte, error) {
	switch r.dialect {
	case plain:
		return []byte(address), nil
	case encoded:
		return fmt.Appendf(nil, `{"version":3,"address":%q,"protocol":"ttrpc"}`, address), nil
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&bootapi.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"})
}

// daemonArgs is the command line of the daemon that start spawns.
func (r *request) daemonArgs(socket string) []string {
	args := []string{"-namespace", r.namespace, "-id", r.id, "-address", r.containerd, "-socket", socket}
	if r.config != "" {
		args = append(args, "-config", r.config)
	}
	if r.hold {
		args = append(args, "-hold")
	}
	if r.debug {
		args = append(args, "-debug")
	}
	return args
}

// eventsPath is the path of the socket that takes events.
func (r *request) eventsPath() string { return strings.TrimPrefix(r.ttrpc, "unix://") }
