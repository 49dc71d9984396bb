package operatorv1

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

func TestValidateStatus(t *testing.T) {
	good := &StatusResponse{
		State:      StatusResponse_STATE_PAUSED,
		Vcpus:      []*VCPU{{Number: 0, Thread: 10}, {Number: 1, Thread: 11}},
		Containers: []*Container{{Id: "a", State: Container_STATE_RUNNING}},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		want string
		edit func(*StatusResponse)
	}{
		{"state STATE_UNSPECIFIED", func(m *StatusResponse) { m.State = 0 }},
		{"state 9", func(m *StatusResponse) { m.State = 9 }},
		{"vCPU 1 on thread 0", func(m *StatusResponse) { m.Vcpus[1].Thread = 0 }},
		{"vCPU 1 on thread 10", func(m *StatusResponse) { m.Vcpus[1].Thread = 10 }},
		{"vCPU 0 on thread 11", func(m *StatusResponse) { m.Vcpus[1].Number = 0 }},
		{"4097 vCPUs", func(m *StatusResponse) { m.Vcpus = make([]*VCPU, 4097) }},
		{`container "" in state`, func(m *StatusResponse) { m.Containers[0].Id = "" }},
		{`container "a" in state STATE_UNSPECIFIED`, func(m *StatusResponse) { m.Containers[0].State = 0 }},
		{`container "a" in state 7`, func(m *StatusResponse) { m.Containers[0].State = 7 }},
		{"4097 containers", func(m *StatusResponse) { m.Containers = make([]*Container, 4097) }},
	} {
		bad := proto.CloneOf(good)
		tt.edit(bad)
		if err := bad.Validate(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want InvalidArgument with %q", err, tt.want)
		}
	}
}
