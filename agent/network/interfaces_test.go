package network

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

const netDev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0
  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0
eth1:18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
short: 1 2
`

func TestParseInterfaces(t *testing.T) {
	want := []*agentv1.InterfaceStats{
		{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8},
		{Name: "eth1", RxBytes: 1<<64 - 1},
	}
	if diff := cmp.Diff(want, parseInterfaces([]byte(netDev)), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestInterfacesOfThisMachine(t *testing.T) {
	all, err := New().Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if err := i.Validate(); err != nil || i.GetName() == "lo" {
			t.Error(i, err)
		}
	}
}
