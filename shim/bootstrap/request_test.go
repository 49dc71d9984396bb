package bootstrap

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func options(t *testing.T, url string, m proto.Message) *anypb.Any {
	t.Helper()
	raw, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: url, Value: raw}
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What each generation of containerd calls start with, and what it is answered.
func TestGenerations(t *testing.T) {
	const (
		ttrpc = "/run/containerd/containerd.sock.ttrpc"
		grpc  = "/run/containerd/containerd.sock"
	)
	config := options(t, "runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigPath: "/etc/husk/other.toml"})
	params := &bootapi.BootstrapParams{
		InstanceID: "demo", Namespace: "default", LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG, ContainerdVersion: "2.4.2",
		ContainerdGrpcAddress: grpc, ContainerdTtrpcAddress: "unix://" + ttrpc, ContainerdBinary: "/usr/bin/containerd",
		SocketDir: proto.String("/run/other/s"),
	}
	for _, o := range []proto.Message{&runtimeoptions.Options{}, config} {
		if err := params.AddExtension(o); err != nil {
			t.Fatal(err)
		}
	}
	bare := &bootapi.BootstrapParams{InstanceID: "demo", Namespace: "default", ContainerdGrpcAddress: grpc, ContainerdTtrpcAddress: ttrpc}
	env16 := map[string]string{"TTRPC_ADDRESS": ttrpc, "GOMAXPROCS": "2"}
	env17 := map[string]string{"TTRPC_ADDRESS": ttrpc, "GRPC_ADDRESS": grpc, "NAMESPACE": "default", "MAX_SHIM_VERSION": "2", "GOMAXPROCS": "2"}
	args := []string{"-namespace", "default", "-address", grpc, "-publish-binary", "/usr/bin/containerd", "-id", "demo"}
	with := func(more ...string) []string { return append(args[:len(args):len(args)], more...) }
	for _, tt := range []struct {
		name  string
		args  []string
		env   map[string]string
		stdin []byte
	}{
		{"1.6", with("start"), env16, nil},
		{"1.6-options", with("-debug", "start"), env16, marshal(t, config)},
		{"1.7", with("-debug", "start"), env17, marshal(t, options(t, runcOptionsType, &runtimeoptions.Options{ConfigPath: "/not/ours"}))},
		{"2.0-to-2.2", with("start"), env17, marshal(t, config)},
		{"2.3", with("start"), env17, marshal(t, bare)},
		{"2.4-options", with("-debug", "start"), env17, marshal(t, params)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := parseArgs(tt.args, func(k string) string { return tt.env[k] })
			if err != nil {
				t.Fatal(err)
			}
			if err := req.readParameters(tt.stdin); err != nil {
				t.Fatal(err)
			}
			path, err := socketPath(req.socketDir, req.containerd, req.namespace, req.id)
			if err != nil {
				t.Fatal(err)
			}
			answer, err := req.answer("unix://" + path)
			if err != nil {
				t.Fatal(err)
			}
			got := fmt.Sprintf("argv   %s\nstdin  %q\ndaemon %s\nevents %s\nanswer %q\n",
				strings.Join(tt.args, " "), tt.stdin, strings.Join(req.daemonArgs("unix://"+path), " "), req.eventsPath(), answer)
			golden(t, filepath.Join("testdata", tt.name+".golden"), got)
		})
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestParseArgsRefuses(t *testing.T) {
	for _, args := range [][]string{
		{"start"},
		{"-id", "a", "start"},
		{"-namespace", "n", "-id", "a"},
		{"-namespace", "n", "-id", "a", "stop"},
		{"-unknown"},
	} {
		if _, err := parseArgs(args, func(string) string { return "" }); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want InvalidArgument", args, err)
		}
	}
}

func TestOptionsRefused(t *testing.T) {
	for name, stdin := range map[string][]byte{
		"another type":  marshal(t, options(t, "windows.Options", &runtimeoptions.Options{})),
		"inline config": marshal(t, options(t, optionsType, &runtimeoptions.Options{ConfigBody: []byte("a = 1")})),
		"relative path": marshal(t, options(t, optionsType, &runtimeoptions.Options{ConfigPath: "a.toml"})),
		"not an Any":    []byte("\xff\xff"),
		"broken":        marshal(t, &anypb.Any{TypeUrl: optionsType, Value: []byte("\xff")}),
	} {
		r := request{id: "a", namespace: "n"}
		if err := r.readParameters(stdin); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

func TestSocketPathFitsASocket(t *testing.T) {
	if _, err := socketPath("/"+strings.Repeat("x", 40), "c", "n", "s"); err != nil {
		t.Error(err)
	}
	if _, err := socketPath("/"+strings.Repeat("x", 43), "c", "n", "s"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a path that is too long: %v, want InvalidArgument", err)
	}
}
