package agentv1

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoregistry"
)

type validator interface {
	proto.Message
	Validate() error
}

func storage(target string) *Storage {
	return &Storage{Kind: Storage_KIND_VIRTIOFS, Source: "husk", Target: target}
}

func configure(edit func(*ConfigureRequest)) *ConfigureRequest {
	m := &ConfigureRequest{SandboxId: "s", ClockNs: 1}
	edit(m)
	return m
}

// A validateCase is a message and a part of the error that it makes; empty: it
// is valid.
type validateCase struct {
	name string
	msg  validator
	want string
}

func checkAll(t *testing.T, cases []validateCase) {
	t.Helper()
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.msg.Validate()
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) || !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("got %v, want an invalid argument holding %q", err, tc.want)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	token := make([]byte, 16)
	checkAll(t, []validateCase{
		{"hello", &HelloRequest{Version: "1.0"}, ""},
		{"hello long", &HelloRequest{Version: strings.Repeat("v", 129)}, "129 bytes"},
		{"hello control byte", &HelloRequest{Version: "a\nb"}, "byte 0xa"},
		{"hello answer", &HelloResponse{AgentStartUs: 1, AgentReadyUs: 2}, ""},
		{"hello answer backwards", &HelloResponse{AgentStartUs: 2, AgentReadyUs: 1}, "before"},
		{"configure", configure(func(*ConfigureRequest) {}), ""},
		{"configure without clock", &ConfigureRequest{SandboxId: "s"}, "clock_ns"},
		{"configure entropy", configure(func(m *ConfigureRequest) { m.Entropy = make([]byte, 513) }), "entropy"},
		{"configure hostname", configure(func(m *ConfigureRequest) { m.Hostname = "a b" }), "hostname"},
		{"configure two on one target", configure(func(m *ConfigureRequest) {
			m.Storages = []*Storage{storage("/run/husk/share"), storage("/run/husk/share")}
		}), "is taken"},
		{"configure sysctl", configure(func(m *ConfigureRequest) { m.Sysctls = []*Sysctl{{Key: "../x"}} }), "sysctls[0]"},
		{"storage", storage("/run/husk/share"), ""},
		{"storage at the top", storage("/run/husk"), "below"},
		{"storage elsewhere", storage("/run/huskies"), "below"},
		{"storage unclean", storage("/run/husk/a/../../etc"), "below"},
		{"storage kind", &Storage{Kind: 7, Source: "x", Target: "/run/husk/a"}, "kind 7"},
		{"storage tag", &Storage{Kind: 1, Source: strings.Repeat("x", 36), Target: "/run/husk/a"}, "36 bytes"},
		{"sysctl dots", &Sysctl{Key: "net.ipv4.ip_forward", Value: "1"}, ""},
		{"sysctl slashes", &Sysctl{Key: "net/ipv4/conf/eth0.1/forwarding", Value: "1"}, ""},
		{"sysctl absolute", &Sysctl{Key: "/etc/passwd"}, "form"},
		{"sysctl up", &Sysctl{Key: "a/../../b"}, "form"},
		{"sysctl zero", &Sysctl{Key: "a", Value: "\x00"}, "zero"},
		{"clock", &SyncClockRequest{ClockNs: -1}, "clock_ns"},
		{"streams", &Streams{Stdin: token, Stdout: token, Stderr: token}, ""},
		{"streams short token", &Streams{Stdin: token[:15]}, "15 bytes"},
		{"terminal with stderr", &Streams{Terminal: true, Stderr: token}, "stderr"},
		{"size without terminal", &Streams{Columns: 80}, "without a terminal"},
		{"huge terminal", &Streams{Terminal: true, Columns: 1 << 16}, "cells"},
		{"create", &CreateContainerRequest{ContainerId: "c", Spec: []byte("{}")}, ""},
		{"create empty spec", &CreateContainerRequest{ContainerId: "c"}, "spec has 0"},
		{"create large spec", &CreateContainerRequest{ContainerId: "c", Spec: make([]byte, MaxSpecBytes+1)}, "spec has"},
		{"create bad id", &CreateContainerRequest{ContainerId: "a/b", Spec: []byte("{}")}, `'/'`},
		{"create dots", &CreateContainerRequest{ContainerId: "..", Spec: []byte("{}")}, `".."`},
		{"create long id", &CreateContainerRequest{ContainerId: strings.Repeat("a", 129), Spec: []byte("{}")}, "129"},
		{"create no pid", &CreateContainerResponse{}, "pid 0"},
		{"exec", &ExecProcessRequest{ContainerId: "c", ExecId: "e", Process: []byte("{}")}, ""},
		{"exec without id", &ExecProcessRequest{ContainerId: "c", Process: []byte("{}")}, "exec_id is empty"},
		{"exec large", &ExecProcessRequest{ContainerId: "c", ExecId: "e", Process: make([]byte, MaxProcessBytes+1)}, "process has"},
		{"signal", &SignalProcessRequest{ContainerId: "c", Signal: 9, All: true}, ""},
		{"signal 0", &SignalProcessRequest{ContainerId: "c"}, "signal 0"},
		{"signal 65", &SignalProcessRequest{ContainerId: "c", Signal: 65}, "signal 65"},
		{"signal all of exec", &SignalProcessRequest{ContainerId: "c", ExecId: "e", Signal: 9, All: true}, "names the exec"},
		{"wait", &WaitProcessRequest{ContainerId: "c"}, ""},
		{"wait bad exec", &WaitProcessRequest{ContainerId: "c", ExecId: "a b"}, "exec_id"},
		{"exit 256", &WaitProcessResponse{ExitStatus: 256}, "256"},
		{"list bad", &ListProcessesResponse{Processes: []*ProcessInfo{{Pid: 1}, {}}}, "processes[1]"},
		{"event", &Event{Event: &Event_Oom{Oom: &OOMEvent{ContainerId: "c"}}}, ""},
		{"event empty", &Event{}, "not known"},
		{"oom without id", &Event{Event: &Event_Oom{}}, "container_id"},
	})
}

// messages returns one empty message of each type in the protocol.
func messages(t testing.TB) []validator {
	file, err := protoregistry.GlobalFiles.FindFileByPath("protocols/agent/v1/agent.proto")
	if err != nil {
		t.Fatal(err)
	}
	var all []validator
	for i := range file.Messages().Len() {
		name := file.Messages().Get(i).FullName()
		mt, err := protoregistry.GlobalTypes.FindMessageByName(name)
		if err != nil {
			t.Fatal(err)
		}
		v, ok := mt.New().Interface().(validator)
		if !ok {
			t.Fatalf("%s has no Validate", name)
		}
		all = append(all, v)
	}
	return all
}

func TestEveryMessageValidates(t *testing.T) {
	if len(messages(t)) == 0 {
		t.Fatal("no messages")
	}
}

// FuzzMessages unmarshals and validates the input as each message: nothing that
// a peer sends may panic, and what is valid survives the way over the wire.
func FuzzMessages(f *testing.F) {
	all := messages(f)
	for i, m := range all {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
	}
	seed, err := proto.Marshal(configure(func(m *ConfigureRequest) {
		m.Storages = []*Storage{storage("/run/husk/share")}
		m.Sysctls = []*Sysctl{{Key: "a.b", Value: "c"}}
	}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint8(2), seed)
	for i, b := range networkSeeds(f, all) {
		f.Add(uint8(i), b)
	}
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		m := proto.Clone(all[int(kind)%len(all)]).(validator)
		if proto.Unmarshal(b, m) != nil || m.Validate() != nil {
			return
		}
		out, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again := m.ProtoReflect().New().Interface().(validator)
		if err := proto.Unmarshal(out, again); err != nil {
			t.Fatal(err)
		}
		if err := again.Validate(); err != nil {
			t.Fatalf("valid before the wire, not after: %v", err)
		}
	})
}

func TestContainerPIDIsAPathOfAnID(t *testing.T) {
	for _, id := range []string{"c1", "a.b_c-d", strings.Repeat("x", 128)} {
		if got, ok := ContainerOfPID(ContainerPID(id)); got != id || !ok {
			t.Errorf("id %q has become %q, %t", id, got, ok)
		}
	}
	for _, path := range []string{
		"", SharedPID, ContainerPID(""), ContainerPID(".."), ContainerPID("a/b"), ContainerPID("a/"),
		"/run/husk/ns/pid-of", "x" + ContainerPID("a"), ContainerPID(strings.Repeat("x", 129)),
	} {
		if id, ok := ContainerOfPID(path); ok {
			t.Errorf("path %q is of the container %q", path, id)
		}
	}
}
