package agent_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

func network(name string) *agentv1.Network {
	return &agentv1.Network{Interfaces: []*agentv1.Interface{{Name: name, Mac: "02:00:00:00:00:01", Mtu: 1500, Addresses: []string{"10.0.0.2/24"}}}}
}

func TestNetwork(t *testing.T) {
	g := newGuest(t)
	_, err := g.Configure(g.ctx, &agentv1.ConfigureRequest{
		SandboxId: "s", ClockNs: 5, Network: network("eth0"), ShmBytes: 1 << 20,
		Sysctls: []*agentv1.Sysctl{{Key: "net/ipv4/conf/eth0/forwarding", Value: "1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	// An interface has its name before a sysctl speaks of it.
	want := []string{"clock 5", `network ["eth0"]`, "sysctl net/ipv4/conf/eth0/forwarding=1", "shm /run/husk/shm 1048576", "pids max 0"}
	if diff := cmp.Diff(want, g.platform.Calls()); diff != "" {
		t.Error(diff)
	}
	if _, err := g.UpdateNetwork(g.ctx, &agentv1.UpdateNetworkRequest{Network: network("eth1")}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.UpdateNetwork(g.ctx, &agentv1.UpdateNetworkRequest{}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("update with nothing: %v", err)
	}
	if diff := cmp.Diff([]*agentv1.Network{network("eth0"), network("eth1")}, g.platform.Networks(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestNetworkThatCannotBe(t *testing.T) {
	g := newGuest(t)
	g.platform.NetworkError = errors.Join(errors.New(`wait for devices "eth0"`), context.DeadlineExceeded)
	g.platform.Sysctls = map[string]bool{}
	_, err := g.Configure(g.ctx, &agentv1.ConfigureRequest{
		SandboxId: "s", ClockNs: 5, Network: network("eth0"), Sysctls: []*agentv1.Sysctl{{Key: "no.such", Value: "1"}},
	})
	// All that is wrong is told at once.
	if err == nil || !strings.Contains(err.Error(), `wait for devices "eth0"`) || !strings.Contains(err.Error(), "set sysctl no.such") {
		t.Errorf("configure: %v", err)
	}
	if _, err := g.UpdateNetwork(g.ctx, &agentv1.UpdateNetworkRequest{Network: network("eth0")}); !errors.Is(errgrpc.ToNative(err), context.DeadlineExceeded) {
		t.Errorf("update: %v", err)
	}
}
